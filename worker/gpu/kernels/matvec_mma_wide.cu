// Decode of 16 rows and more with tiles of 64 weight rows: the products of matvec_mma.cu with the
// same bits, for longer rows and more tokens. A tile reads its activations once for 64 rows; they
// are copied to shared memory a stage ahead, weights are loaded to registers two stages ahead.
//
// Shapes: see matvec_mma.cu; h also as Q8 tiles, if its rows are a multiple of 32. Grid: x over tiles of 8·NT tokens, y over row tiles, which a block takes
// gridDim.y apart; 512 threads, one block a multiprocessor. A row tile is 64 rows of one matrix; with
// GATED it is 32 rows of each of two, eight by eight, a Q8 block of h.
// Alignment: planes and q 16 bytes. Dynamic shared memory: WideShape::kBytes. Bytes: each weight once
// for each tile of tokens; the activations of a tile once for each row tile.
// Order and rounding: matvec_mma.cu. Of the 16 warps, warp w takes rows 16·(w/4) to 16·(w/4) + 15 and
// the chains l with l % 4 == w % 4, two at a time: chains l and l + 16 are open together, and the
// sums of the four pairs, in bit-reversed order, wait in shared memory.
// Twins: see matvec_mma.cu. Launcher: worker/gpu/matvec_mma.py.
#include "mma_product.cuh"
#include "pdl.cuh"

constexpr int kRowGroups = 4, kPairWarps = 4, kPairs = 4;  // 16 rows each; warps along K; pairs of a warp
constexpr int kWideWarps = kRowGroups * kPairWarps, kWideThreads = 32 * kWideWarps, kWideRows = 16 * kRowGroups;
constexpr int kStageUnits = 2 * kPairWarps;  // of a stage: those of chains l and l + 16

template <class Block, int NT, bool GATED>
struct WideShape {
    static constexpr int kTokens = 8 * NT, kTiles = NT / 2, kSums = 4 * NT;
    static constexpr int kMetaKinds = 1 + RowScales<Block>::kSums;
    static constexpr int kWeights = kRowGroups * kStageUnits * kUnitBytes<Block>;
    static constexpr int kQ = kStageUnits * kTiles * 512, kMeta = kStageUnits * kTiles * kTileMeta * 4;
    static constexpr int kQAt = 2 * kWeights, kMetaAt = kQAt + 2 * kQ, kSumsAt = kMetaAt + 2 * kMeta;
    static constexpr int kLevel = kWideThreads * kSums * 4;  // bytes of a level of sums; h uses the second one
    static constexpr int kBytes = kSumsAt + 2 * kLevel;
    static_assert(!GATED || kTokens * 33 * 4 <= kLevel, "h fits");
};

// A stage of 8 units: row tile, split, pair of chains, units of the chains.
struct WideStage {
    int tile, split, pair, step;
    __device__ __forceinline__ int first_unit(int split_k) const {
        return 32 * (split + split_k * step) + kPairWarps * (pair >> 1 | (pair & 1) << 1);
    }
    // Go to the next stage and return whether it is in another row tile.
    __device__ __forceinline__ bool advance(int steps, int split_k, int stride) {
        if (++step < steps) return false;
        step = 0;
        if (++pair < kPairs) return false;
        pair = 0;
        if (++split < split_k) return false;
        split = 0, tile += stride;
        return true;
    }
};

// Write 32 elements of h from shared memory, [TOKENS][33], as f32 and Q8 tiles.
template <int TOKENS>
__device__ __forceinline__ void write_hidden(const MmaParams& p, int unit, int first_token, const float* hidden) {
    const int lane = threadIdx.x % 32, column = 32 * unit + lane, rows = p.matrices[0].rows;
#pragma unroll 1
    for (int t = threadIdx.x / 32; t < TOKENS; t += kWideWarps) {
        const int row = first_token + t;
        const float h = hidden[t * 33 + lane];
        if (row < p.tokens && column < rows) p.matrices[0].out[(size_t)row * rows + column] = h;
        if (p.h.q && row < p.h.tiles * kTileRows) p.h.store_lane(h, row, unit);
    }
}

// The row tiles `first_tile`, `first_tile` + `stride`, … before `end`.
template <class Block, int NT, bool GATED>
__device__ __forceinline__ void compute_tiles(const MmaParams& p, int first_tile, int end, int stride, u8* shared) {
    using Shape = WideShape<Block, NT, GATED>;
    using Finished = FinishedSums<kPairWarps, NT, NT>;
    __shared__ __align__(16) IntBias int_bias;
    const int lane = threadIdx.x % 32, chain = threadIdx.x / 32 % kPairWarps, row_group = threadIdx.x / 32 / kPairWarps;
    const int units = p.x.units, steps = ((units + 31) / 32 + p.split_k - 1) / p.split_k;
    const int first_token = blockIdx.x * Shape::kTokens;
    float* const levels = reinterpret_cast<float*>(shared + Shape::kSumsAt);
    const StoredSums<NT> lower(levels), upper(levels + Shape::kLevel / 4);
    const Finished finished(chain);

    // Weights of a stage: a unit of a row a thread.
    const int slot = threadIdx.x % kStageUnits, loaded_row = threadIdx.x / kStageUnits;
    const int offset = slot % kPairWarps + slot / kPairWarps * 16;  // of the slot's unit from the stage's first
    WideStage ahead{first_tile, 0, 0, 0};
    Unit<Block> loaded;
    u32 row_units = 0, index = 0;
    int matrix = 0, loaded_unit = 0;
    const auto find_row = [&] {
        if (ahead.tile >= end) return;
        const TileRow<kWideRows, GATED> r(p, ahead.tile, loaded_row);
        matrix = r.matrix, row_units = (u32)min(r.row, p.matrices[r.matrix].rows - 1) * units;
    };
    const auto load_weights = [&] {
        loaded_unit = ahead.first_unit(p.split_k) + offset;
        index = row_units + min(loaded_unit, units - 1);
        loaded.load(p.matrices[matrix].planes, index);  // past the end the last row again
    };
    const auto store_weights = [&](int buffer) {
        u8* const to = shared + buffer * Shape::kWeights +
                       (loaded_row / 16 * kStageUnits + slot) * kUnitBytes<Block>;
        store_unit(loaded, index, loaded_unit < units, loaded_row % 16, to);
    };
    // Activations of a stage: chunks of 16 bytes of a slot's unit, kCopies of q and one of meta a thread.
    constexpr int kSlotQ = Shape::kTiles * 32, kCopies = (kStageUnits * kSlotQ + kWideThreads - 1) / kWideThreads;
    constexpr int kTileMetas = 4 * Shape::kMetaKinds, kSlotMeta = Shape::kTiles * kTileMetas;
    static_assert(kStageUnits * kSlotMeta <= kWideThreads && (kCopies == 1 || kWideThreads % kSlotQ == 0), "one slot a copy");
    const int meta_slot = threadIdx.x / kSlotMeta, meta_chunk = threadIdx.x % kSlotMeta;
    const u32 meta_at = meta_chunk / kTileMetas * kTileMeta + meta_chunk % kTileMetas * 4;
    const u32 q_from = first_token * 32 + threadIdx.x % kSlotQ * 16, meta_from = first_token * 3 + meta_at;
    const u32 q_stride = p.x.tiles * 512, meta_stride = p.x.tiles * kTileMeta;
    const auto copy_tokens = [&](int buffer) {  // of the stage of `ahead`; past the last unit that one again
        const int first = ahead.first_unit(p.split_k);
        const auto unit_of = [&](int s) -> u32 { return min(first + s % kPairWarps + s / kPairWarps * 16, units - 1); };
#pragma unroll
        for (int k = 0; k < kCopies; ++k) {
            const int i = threadIdx.x + k * kWideThreads;
            if (kStageUnits * kSlotQ % kWideThreads == 0 || i < kStageUnits * kSlotQ)
                copy_16_async(shared + Shape::kQAt + buffer * Shape::kQ + i * 16, p.x.q + (unit_of(i / kSlotQ) * q_stride + q_from), true);
        }
        if (meta_slot < kStageUnits)
            copy_16_async(shared + Shape::kMetaAt + buffer * Shape::kMeta + (meta_slot * Shape::kTiles * kTileMeta + meta_at) * 4,
                          p.x.meta + (unit_of(meta_slot) * meta_stride + meta_from), true);
        commit_copies();
    };
    const auto next_stage = [&] {
        if (ahead.advance(steps, p.split_k, stride)) find_row();
        load_weights();
    };

    find_row();
    load_weights();  // before the wait (pdl.cuh): weights are constant during a step
    launch_dependents();
    grid_dependency_wait();
    copy_tokens(0);
    store_weights(0);
    next_stage();
    int_bias.store();
    wait_for_copies<0>();
    __syncthreads();
    const int4 bias = int_bias.load();
    int buffer = 0;
    const u32 own_weights = row_group * kStageUnits + chain;
    for (int tile = first_tile; tile < end; tile += stride) {
        float y[NT];
        for (int split = 0; split < p.split_k; ++split) {
            Sums<NT> a, b;
#pragma unroll 1
            for (int pair = 0; pair < kPairs; ++pair) {
                clear(a), clear(b);
#pragma unroll 1
                for (int step = 0; step < steps; ++step) {
                    store_weights(buffer ^ 1);
                    copy_tokens(buffer ^ 1);
                    next_stage();
                    const u8* const weights = shared + buffer * Shape::kWeights + own_weights * kUnitBytes<Block>;
                    const u8* const q = shared + Shape::kQAt + buffer * Shape::kQ + chain * Shape::kTiles * 512 + lane * 16;
                    const float* const meta = reinterpret_cast<const float*>(shared + Shape::kMetaAt + buffer * Shape::kMeta) +
                                              chain * Shape::kTiles * kTileMeta + lane % 4 * 4;
                    multiply_unit<Block, NT>(weights, q, meta, bias, a);
                    multiply_unit<Block, NT>(weights + kPairWarps * kUnitBytes<Block>, q + kPairWarps * Shape::kTiles * 512,
                                             meta + kPairWarps * Shape::kTiles * kTileMeta, bias, b);
                    buffer ^= 1;
                    wait_for_copies<0>();
                    __syncthreads();
                }
#pragma unroll
                for (int i = 0; i < 4 * NT; ++i) a[i / 4][i % 4] = __fadd_rn(a[i / 4][i % 4], b[i / 4][i % 4]);
                if (pair == 1) lower.add_to(a);
                if (pair == 3) upper.add_to(a), lower.add_to(a);
                (pair == 2 ? upper : lower).store(a);
            }
            __syncthreads();
            float total[NT];
            finished.add(levels + row_group * kPairWarps * 32 * Shape::kSums, total);
#pragma unroll
            for (int k = 0; k < NT; ++k) y[k] = split == 0 ? total[k] : __fadd_rn(y[k], total[k]);
        }
        if constexpr (GATED) {
            float* const hidden = levels + Shape::kLevel / 4;  // [kTokens][33]
            each_gated<kWideRows>(p, tile, 16 * row_group, first_token, finished, y,
                                  [&](int row, int t, float h) { hidden[(t - first_token) * 33 + row % 32] = h; });
            __syncthreads();
            write_hidden<Shape::kTokens>(p, tile, first_token, hidden);
        } else {
            write_rows<kWideRows>(p, tile, 16 * row_group, first_token, finished, y);
        }
    }
}

// Last: the type of the third matrix, whose row tiles belong to the blocks from `last_block` on.
template <class Block, int NT, bool GATED, class Last = Block>
__global__ void __launch_bounds__(kWideThreads, 1) matvec_mma_wide(const __grid_constant__ MmaParams p) {
    extern __shared__ __align__(16) u8 shared[];
    const int block = blockIdx.y, blocks = gridDim.y, tiles = p.matrices[2].first_tile;
    if constexpr (kSame<Block, Last>)
        compute_tiles<Block, NT, GATED>(p, block, p.tiles, blocks, shared);
    else if (block < p.last_block)
        compute_tiles<Block, NT, GATED>(p, block, tiles, p.last_block, shared);
    else
        compute_tiles<Last, NT, GATED>(p, tiles + block - p.last_block, p.tiles, blocks - p.last_block, shared);
}
