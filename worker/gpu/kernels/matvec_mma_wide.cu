// Decode of 16 rows and more with tiles of 32 × 32 outputs a warp: the products of matvec_mma.cu
// with the same bits, for more weight rows and tokens. Activations are copied to shared memory a
// stage ahead, weights are loaded to registers two stages ahead and converted one stage ahead.
//
// Shapes: see matvec_mma.cu; h also as Q8 tiles, if a tile has whole Q8 blocks of h and its rows
// are a multiple of 32. Grid: x over tiles of 32·TW tokens, y over row tiles, which a block takes
// gridDim.y apart; 32·WARPS threads, eight warps a multiprocessor. KG of the warps share the sums
// of 32 rows and 32 tokens, so a row tile is 32·WARPS/(KG·TW) rows of one matrix; with GATED half
// of them are of each of two, eight by eight.
// Alignment: planes and q 16 bytes. Dynamic shared memory: WideShape::kBytes. Bytes: each weight
// once for each tile of tokens; the activations of a tile once for each row tile.
// Order and rounding: matvec_mma.cu. Warp g of KG takes the chains l with l % KG == g, four at a
// time:
// chains b, b + 8, b + 16 and b + 24 are open together, for the numbers b in bit-reversed order.
// Their sums wait in shared memory for the next levels of the tree, the last of which add warps.
// Twins: see matvec_mma.cu. Launcher: worker/gpu/matvec_mma.py.
#include "mma_product.cuh"
#include "pdl.cuh"

constexpr int kOpen = 4;       // chains of a warp that are open together
constexpr int kWarpTiles = 8;  // MMAs of a warp's 32 rows and 32 tokens: those of rows 0 to 15 first

template <class Block, int WARPS, int KG, int TW>
struct WideShape {
    static constexpr int kThreads = 32 * WARPS, kTokens = 32 * TW, kTiles = 2 * TW, kRows = kThreads / (KG * TW);
    static constexpr int kUnits = kOpen * KG, kLoads = kRows * kUnits / kThreads;  // of a stage; of a thread
    static constexpr int kBases = 8 / KG, kSums = 4 * kWarpTiles / KG;  // b of a warp; sums that a thread finishes
    static constexpr int kMetaKinds = 1 + RowScales<Block>::kSums;
    static constexpr int kRowUnits = kUnits * kUnitBytes<Block>;  // bytes of 16 rows
    static constexpr int kWeights = kRows / 16 * kRowUnits;
    static constexpr int kQ = kUnits * kTiles * 512, kMeta = kUnits * kTiles * kMetaKinds * kTileRows * 4;
    static constexpr int kLevel = kThreads * kWarpTiles * 16, kLevels = KG == 2 ? 2 : 1;
    static constexpr int kQAt = 2 * kWeights, kMetaAt = kQAt + 2 * kQ, kLevelsAt = kMetaAt + 2 * kMeta;
    static constexpr int kTotalAt = kLevelsAt + kLevels * kLevel;  // sums of earlier splits, or h
    static constexpr int kBytes = kTotalAt + kThreads * kSums * 4;
    static constexpr bool kWritesQ8 = kRows % 64 == 0;  // whole Q8 blocks of h
    static_assert(KG == 2 || KG == 4 || KG == 8, "levels, order of b");
    static_assert(!kWritesQ8 || kTokens * (kRows / 2 + 1) <= kThreads * kSums, "h fits");
    // Unit of a slot of a stage, from the stage's first one on.
    static __device__ __forceinline__ constexpr int unit_of(int slot) { return slot / KG * 8 + slot % KG; }
};

// A stage of 4·KG units: row tile, split, b, units of the chains.
template <int KG>
struct WideStage {
    int tile, split, base, step;
    __device__ __forceinline__ int first_unit(int split_k) const {
        return 32 * (split + split_k * step) + KG * (KG == 2 ? base >> 1 | (base & 1) << 1 : base);
    }
    // Go to the next stage and return whether it is in another row tile.
    __device__ __forceinline__ bool advance(int units, int split_k, int stride) {
        if (32 * (split + split_k * ++step) < units) return false;
        step = 0;
        if (++base < 8 / KG) return false;
        base = 0;
        if (++split < split_k) return false;
        split = 0, tile += stride;
        return true;
    }
};

// Write h of a tile from shared memory, [TOKENS][ROWS / 2 + 1], as f32 and Q8 tiles.
template <int WARPS, int TOKENS, int ROWS>
__device__ __forceinline__ void write_hidden(const MmaParams& p, int tile, int first_token, const float* hidden) {
    constexpr int kBlocks = ROWS / 64;
    const int lane = threadIdx.x % 32, rows = p.matrices[0].rows;
#pragma unroll 8  // the exchanges of several rows overlap
    for (int n = 0; n < TOKENS * kBlocks / WARPS; ++n) {
        const int i = n * WARPS + threadIdx.x / 32, t = i / kBlocks, block = i % kBlocks, unit = tile * kBlocks + block;
        const int row = first_token + t, column = 32 * unit + lane;
        const float h = hidden[t * (ROWS / 2 + 1) + 32 * block + lane];
        if (row < p.tokens && column < rows) p.matrices[0].out[(size_t)row * rows + column] = h;
        if (p.h.q && row < p.h.tiles * kTileRows && unit < p.h.units) p.h.store_lane(h, row, unit);
    }
}

// A unit of 32 weight rows and 32 tokens: acc += weights·x.
template <class Block>
__device__ __forceinline__ void multiply_square(const u8* weights, u32 upper_rows, const u8* q, const float* meta,
                                                const int4& bias, Sums<kWarpTiles>& acc) {
    const RowFragment<Block> low(weights), high(weights + upper_rows);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        TokenFragment<Block> t;
        t.load(q + n * 512, meta + n * (1 + RowScales<Block>::kSums) * kTileRows);
        multiply_fragments<Block, false>(low, t, bias, acc[2 * n]);
        multiply_fragments<Block, true>(low, t, bias, acc[2 * n + 1]);
        multiply_fragments<Block, false>(high, t, bias, acc[4 + 2 * n]);
        multiply_fragments<Block, true>(high, t, bias, acc[4 + 2 * n + 1]);
    }
}

// The row tiles `first_tile`, `first_tile` + `stride`, … before `end`.
template <class Block, int WARPS, int KG, int TW, int GATED>
__device__ __forceinline__ void compute_tiles(const MmaParams& p, int first_tile, int end, int stride, u8* shared) {
    using Shape = WideShape<Block, WARPS, KG, TW>;
    constexpr int kThreads = Shape::kThreads, kLoads = Shape::kLoads;
    constexpr int kHeld = 2;  // units that a thread holds between load and store
    __shared__ __align__(16) IntBias int_bias;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int chain = warp % KG, token_warp = warp / KG % TW, row_warp = warp / (KG * TW);
    const int units = p.x.units, first_token = blockIdx.x * Shape::kTokens;

    // Weights: thread t takes unit t % kUnits of rows t / kUnits, …, kLoads of them.
    constexpr int kRowStep = kThreads / Shape::kUnits;
    const int slot = threadIdx.x % Shape::kUnits, loaded_row = threadIdx.x / Shape::kUnits;
    WideStage<KG> ahead{first_tile, 0, 0, 0};
    Unit<Block> loaded[kHeld];
    u32 row_units[kLoads];
    int matrix = 0, loaded_unit = 0, stored_unit = 0;
    const auto enter_tile = [&] {
        if (ahead.tile >= end) return;
#pragma unroll
        for (int k = 0; k < kLoads; ++k) {
            const TileRow<Shape::kRows, GATED> r(p, ahead.tile, loaded_row + k * kRowStep);
            matrix = r.matrix, row_units[k] = (u32)min(r.row, p.matrices[r.matrix].rows - 1) * units;
        }
    };
    const auto enter_stage = [&] { loaded_unit = ahead.first_unit(p.split_k) + Shape::unit_of(slot); };
    const auto load_weights = [&](int k) {  // past the end the last row again
        const int from = GATED ? (loaded_row + k * kRowStep) / 8 % 2 : matrix;
        loaded[k % kHeld].load(p.matrices[from].planes, row_units[k] + min(loaded_unit, units - 1));
    };
    // Store unit k of a stage, and load the unit that takes its registers.
    const auto store_and_load = [&](int k, int buffer) {
        const int row = loaded_row + k * kRowStep;
        store_unit(loaded[k % kHeld], stored_unit, stored_unit < units, row % 16,
                   shared + buffer * Shape::kWeights + row / 16 * Shape::kRowUnits + slot * kUnitBytes<Block>);
        if (k + kHeld == kLoads) {
            if (ahead.advance(units, p.split_k, stride)) enter_tile();
            enter_stage();
        }
        load_weights((k + kHeld) % kLoads);
    };
    // Activations of a stage, in chunks of 16 bytes; zeros past the last unit.
    constexpr int kSlotQ = Shape::kTiles * 32, kCopies = Shape::kUnits * kSlotQ / kThreads;
    constexpr int kTileMetas = 4 * Shape::kMetaKinds, kSlotMeta = Shape::kTiles * kTileMetas, kMetas = Shape::kUnits * kSlotMeta;
    static_assert(kThreads % kSlotQ == 0, "copies of a thread are whole slots apart");
    const u32 q_stride = p.x.tiles * 512, meta_stride = p.x.tiles * kTileMeta;
    const u32 q_from = first_token * 32 + threadIdx.x % kSlotQ * 16;
    const int copied_unit = Shape::unit_of(threadIdx.x / kSlotQ);
    const auto copy_tokens = [&](int buffer) {
        const int first = ahead.first_unit(p.split_k);
        u8* const q = shared + Shape::kQAt + buffer * Shape::kQ + threadIdx.x * 16;
        u8* const meta = shared + Shape::kMetaAt + buffer * Shape::kMeta + threadIdx.x * 16;
#pragma unroll
        for (int k = 0; k < kCopies; ++k) {
            const u32 unit = first + copied_unit + Shape::unit_of(k * (kThreads / kSlotQ));
            copy_16_async(q + k * kThreads * 16, p.x.q + (unit * q_stride + q_from), unit < units);
        }
#pragma unroll
        for (int k = 0; k * kThreads < kMetas; ++k) {
            const int i = threadIdx.x + k * kThreads, chunk = i % kSlotMeta;
            const u32 unit = first + Shape::unit_of(i / kSlotMeta);
            const u32 from = first_token * 3 + chunk / kTileMetas * kTileMeta + chunk % kTileMetas * 4;
            if (kMetas % kThreads == 0 || i < kMetas)
                copy_16_async(meta + k * kThreads * 16, p.x.meta + (unit * meta_stride + from), unit < units);
        }
        commit_copies();
    };

    enter_tile();
    enter_stage();
#pragma unroll
    for (int k = 0; k < kHeld; ++k) load_weights(k);  // before the wait (pdl.cuh): weights are constant during a step
    launch_dependents();
    grid_dependency_wait();
    copy_tokens(0);
    stored_unit = loaded_unit;
#pragma unroll
    for (int k = 0; k < kLoads; ++k) store_and_load(k, 0);
    int_bias.store();
    wait_for_copies<0>();
    __syncthreads();
    const int4 bias = int_bias.load();

    // This warp's part of a stage, the levels of the tree, what a thread finishes.
    const u8* const own_weights = shared + 2 * row_warp * Shape::kRowUnits + chain * kUnitBytes<Block>;
    const u8* const own_q = shared + Shape::kQAt + (chain * Shape::kTiles + 2 * token_warp) * 512 + lane * 16;
    const u8* const own_meta = shared + Shape::kMetaAt + (chain * Shape::kTiles + 2 * token_warp) * kTileMetas * 16 + lane % 4 * 16;
    float* const levels = reinterpret_cast<float*>(shared + Shape::kLevelsAt);
    const FinishedSums<KG, kWarpTiles, Shape::kSums, 4> finished(chain);
    float4* const totals = reinterpret_cast<float4*>(shared + Shape::kTotalAt) + threadIdx.x;
    int buffer = 0;
    Sums<kWarpTiles> acc[kOpen];
    const auto multiply_stage = [&] {
        copy_tokens(buffer ^ 1);
        stored_unit = loaded_unit;
        const u8* const weights = own_weights + buffer * Shape::kWeights;
        const u8* const q = own_q + buffer * Shape::kQ;
        const u8* const meta = own_meta + buffer * Shape::kMeta;
#pragma unroll
        for (int j = 0; j < kOpen; ++j) {
            if (j * kLoads % kOpen == 0) store_and_load(j * kLoads / kOpen, buffer ^ 1);
            multiply_square<Block>(weights + j * KG * kUnitBytes<Block>, Shape::kRowUnits, q + j * KG * Shape::kTiles * 512,
                                   reinterpret_cast<const float*>(meta + j * KG * kSlotMeta * 16), bias, acc[j]);
        }
        buffer ^= 1;
        wait_for_copies<0>();
        __syncthreads();
    };
    for (int tile = first_tile; tile < end; tile += stride) {
        float y[Shape::kSums];
        for (int split = 0; split < p.split_k; ++split) {
#pragma unroll 1
            for (int base = 0; base < Shape::kBases; ++base) {
#pragma unroll
                for (int j = 0; j < kOpen; ++j) clear(acc[j]);
                multiply_stage();  // apart from the loop, so that the compiler adds to constant zeros
#pragma unroll 1
                for (int step = 1; 32 * (split + p.split_k * step) < units; ++step) multiply_stage();
#pragma unroll
                for (int i = 0; i < 4 * kWarpTiles; ++i) {
                    const auto sum = [&](int j) -> float& { return acc[j][i / 4][i % 4]; };
                    sum(0) = __fadd_rn(__fadd_rn(sum(0), sum(2)), __fadd_rn(sum(1), sum(3)));
                }
                int level = 0;  // base + 1 in binary: a level for each one that a zero replaces
                for (; base >> level & 1; ++level) StoredSums<kWarpTiles>(levels + level * Shape::kLevel / 4).add_to(acc[0]);
                if (base + 1 == Shape::kBases) level = 0;
                StoredSums<kWarpTiles>(levels + level * Shape::kLevel / 4).store(acc[0]);
            }
            __syncthreads();
            finished.add(levels + (threadIdx.x / 32 - chain) * 32 * 4 * kWarpTiles, y);
            if (p.split_k == 1) continue;
#pragma unroll
            for (int k = 0; k < Shape::kSums; k += 4) {
                float4& total = totals[k / 4 * kThreads];
                if (split > 0) {
                    y[k] = __fadd_rn(total.x, y[k]), y[k + 1] = __fadd_rn(total.y, y[k + 1]);
                    y[k + 2] = __fadd_rn(total.z, y[k + 2]), y[k + 3] = __fadd_rn(total.w, y[k + 3]);
                }
                total = make_float4(y[k], y[k + 1], y[k + 2], y[k + 3]);
            }
        }
        const int first_row = 32 * row_warp, first_column = first_token + 32 * token_warp;
        if constexpr (GATED && Shape::kWritesQ8) {
            float* const hidden = reinterpret_cast<float*>(shared + Shape::kTotalAt);  // [kTokens][kRows / 2 + 1]
            each_gated<Shape::kRows, GATED>(p, tile, first_row, first_column, finished, y, [&](int row, int t, float h) {
                hidden[(t - first_token) * (Shape::kRows / 2 + 1) + row % (Shape::kRows / 2)] = h;
            });
            __syncthreads();
            write_hidden<WARPS, Shape::kTokens, Shape::kRows>(p, tile, first_token, hidden);
        } else if constexpr (GATED) {
            write_gated<Shape::kRows, GATED>(p, tile, first_row, first_column, finished, y);
        } else {
            write_rows<Shape::kRows>(p, tile, first_row, first_column, finished, y);
        }
    }
}

// Last: the type of the third matrix, whose row tiles belong to the blocks from `last_block` on.
template <class Block, int WARPS, int KG, int TW, int GATED, class Last = Block>
__global__ void __launch_bounds__(32 * WARPS, 8 / WARPS) matvec_mma_wide(const __grid_constant__ MmaParams p) {
    extern __shared__ __align__(16) u8 shared[];
    const int block = blockIdx.y, blocks = gridDim.y, tiles = p.matrices[2].first_tile;
    if constexpr (kSame<Block, Last>)
        compute_tiles<Block, WARPS, KG, TW, GATED>(p, block, p.tiles, blocks, shared);
    else if (block < p.last_block)
        compute_tiles<Block, WARPS, KG, TW, GATED>(p, block, tiles, p.last_block, shared);
    else
        compute_tiles<Last, WARPS, KG, TW, GATED>(p, tiles + block - p.last_block, p.tiles, blocks - p.last_block, shared);
}
