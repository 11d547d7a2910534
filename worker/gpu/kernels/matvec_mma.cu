// Decode of 16 rows and more: y_j[t] = W_j·x[t] + b_j + residual[t], or
// h[t] = gated(W_0·x[t] + b_0, W_1·x[t] + b_1), on the tensor cores, with the bits of matvec.cu and
// glu.cu.
//
// Shapes: W_j [rows_j, cols] in planes, of type Block, the third one of type Last; b_j [rows_j],
// residual [T, rows] and y_j [T, rows_j] f32; x as Q8 tiles (q8_tiles.cuh) with a factor for each
// row; h [T, rows] f32.
// Grid: x over tiles of 8·NT tokens, y over row tiles, which a block takes gridDim.y apart, so that
// its loads run ahead over their ends; 256·SPLITS threads. A row tile is 16 rows of one matrix;
// with GATED it is 8 rows of each of two: an MMA's first 8 are of W_0.
// Alignment: planes and q 16 bytes. Dynamic shared memory: Shape::kBytes. Bytes: each weight once
// for each tile of tokens, 16-byte loads; the activations of a tile once for each row tile, from L1
// where they fit.
// Order and rounding: vec_dot.cuh, then splits ascending, then fma(sum, factor, bias + residual). A
// row's sum in a split is a tree over 32 chains of units, chain l with units l, l + 32·split_k, …;
// it adds chains that differ in bit 16 first, then in bit 8, 4, 2 and 1. Of eight warps, warp w
// takes the chains l with l % 8 == w; SPLITS groups of eight warps take a split each.
// Twins: `norm_linear`, `linear_add`, `norm_glu` in worker/cpu/ops.py; tests/quantized_ops.py.
// Launcher: worker/gpu/matvec_mma.py.
#include "mma_product.cuh"
#include "pdl.cuh"

constexpr int kChainWarps = 8, kChains = 32 / kChainWarps;  // warps that share a stage of 32 units, chains of a warp

// The activations of a block in global memory, from this lane's part on.
struct TokenTile {
    const u8* q;
    const float* meta;
    u32 q_stride, meta_stride;  // of a unit
    int units;
    __device__ __forceinline__ TokenTile(const Q8Tiles& x, int first_token)
        : q(x.q + (size_t)first_token * 32 + threadIdx.x % 32 * 16),
          meta(x.meta + (size_t)first_token * 3 + threadIdx.x % 4 * 4),
          q_stride(x.tiles * 512),
          meta_stride(x.tiles * kTileMeta),
          units(x.units) {}
};

// acc[j] += weights·x over the unit of chain warp + 8·j in a stage that starts at unit
// `base`. Past the last unit the weights' scales are zero, and the last unit's x is read.
template <class Block, int NT>
__device__ __forceinline__ void multiply_stage(const TokenTile& x, int base, const u8* weights, const int4& bias,
                                               Sums<NT> (&acc)[kChains]) {
    const int warp = threadIdx.x / 32 % kChainWarps;
#pragma unroll
    for (int j = 0; j < kChains; ++j) {
        const int chain = warp + kChainWarps * j;
        const u32 unit = min(base + chain, x.units - 1);
        multiply_unit<Block, NT>(weights + chain * kUnitBytes<Block>, x.q + unit * x.q_stride,
                                        x.meta + unit * x.meta_stride, bias, acc[j]);
    }
}

template <class Block, int SPLITS, int NT, int GATED>
struct MmaShape {
    static constexpr int kGroup = 32 * kChainWarps, kThreads = kGroup * SPLITS, kTokens = 8 * NT;
    static constexpr int kLoads = 32 * 16 / kGroup;  // units of a thread in a stage of 32 units a split
    static constexpr int kSplitBytes = 32 * kUnitBytes<Block>, kBuffer = SPLITS * kSplitBytes;
    static constexpr int kSums = 4 * NT, kLeast = GATED ? 2 : 1, kEach = kSums / (kChainWarps * SPLITS);
    static constexpr int kShare = kEach > kLeast ? kEach : kLeast;  // sums that a thread finishes
    static constexpr int kSumsAt = 2 * kBuffer, kBytes = kSumsAt + 4 * kThreads * kSums;
};

// A stage of 32 units: row tile, splits, units of the chains.
struct Stage {
    int tile, pass, step;
    // Go to the next stage and return whether it is in another row tile.
    __device__ __forceinline__ bool advance(int steps, int passes, int stride) {
        if (++step < steps) return false;
        step = 0;
        if (++pass < passes) return false;
        pass = 0;
        tile += stride;
        return true;
    }
};

// The row tiles `first_tile`, `first_tile` + `stride`, … before `end`.
template <class Block, int SPLITS, int NT, int GATED>
__device__ __forceinline__ void compute_tiles(const MmaParams& p, int first_tile, int end, int stride, u8* shared) {
    using Shape = MmaShape<Block, SPLITS, NT, GATED>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kChainWarps, split = threadIdx.x / Shape::kGroup;
    const int units = p.x.units, steps = ((units + 31) / 32 + p.split_k - 1) / p.split_k;
    const int passes = (p.split_k + SPLITS - 1) / SPLITS, first_token = blockIdx.x * Shape::kTokens;
    u8* const own = shared + split * Shape::kSplitBytes;
    float* const sums = reinterpret_cast<float*>(shared + Shape::kSumsAt);
    using Finished = FinishedSums<kChainWarps, NT, Shape::kShare>;
    const Finished finished(threadIdx.x / 32);
    const auto first_unit = [&](const Stage& at) { return 32 * (at.pass * SPLITS + split + p.split_k * at.step); };

    // Weights of a stage: unit `lane` of rows warp, warp + 8, … of the tile.
    Stage ahead{first_tile, 0, 0};
    Unit<Block> loaded[Shape::kLoads];
    u32 row_units[Shape::kLoads], indices[Shape::kLoads];
    int matrices[Shape::kLoads];
    bool valid;
    const auto find_rows = [&] {
        if (ahead.tile >= end) return;
#pragma unroll
        for (int k = 0; k < Shape::kLoads; ++k) {
            const TileRow<16, GATED> r(p, ahead.tile, warp + k * kChainWarps);
            matrices[k] = r.matrix, row_units[k] = (u32)min(r.row, p.matrices[r.matrix].rows - 1) * units;
        }
    };
    const auto load_weights = [&] {
        const int unit = first_unit(ahead) + lane;
        valid = unit < units;
#pragma unroll
        for (int k = 0; k < Shape::kLoads; ++k) {
            indices[k] = row_units[k] + min(unit, units - 1);
            loaded[k].load(p.matrices[GATED ? k : matrices[k]].planes, indices[k]);  // past the end the last row again
        }
        if (ahead.advance(steps, passes, stride)) find_rows();
    };
    const auto store_weights = [&](int buffer) {
#pragma unroll
        for (int k = 0; k < Shape::kLoads; ++k)
            store_unit(loaded[k], indices[k], valid, warp + k * kChainWarps,
                       own + buffer * Shape::kBuffer + lane * kUnitBytes<Block>);
    };
    const TokenTile tokens(p.x, first_token);
    Sums<NT> acc[kChains];
    __shared__ __align__(16) IntBias int_bias;

    find_rows();
    load_weights();  // before the wait (pdl.cuh): weights are constant during a step
    launch_dependents();
    grid_dependency_wait();
    store_weights(0);
    load_weights();
    int_bias.store();
    __syncthreads();
    const int4 bias = int_bias.load();
    int buffer = 0;
    Stage at{first_tile, 0, 0};
    while (at.tile < end) {
        const int tile = at.tile;
        float y[Shape::kShare];
        for (int pass = 0; pass < passes; ++pass) {
#pragma unroll
            for (int j = 0; j < kChains; ++j) clear(acc[j]);
#pragma unroll 1
            for (int step = 0; step < steps; ++step) {
                store_weights(buffer ^ 1);
                load_weights();
                const u8* const weights = own + buffer * Shape::kBuffer;
                multiply_stage<Block, NT>(tokens, first_unit(at), weights, bias, acc);
                at.advance(steps, passes, stride);
                buffer ^= 1;
                __syncthreads();
            }
#pragma unroll
            for (int i = 0; i < 4 * NT; ++i) {
                const auto sum = [&](int j) -> float& { return acc[j][i / 4][i % 4]; };
                sum(0) = __fadd_rn(__fadd_rn(sum(0), sum(2)), __fadd_rn(sum(1), sum(3)));
            }
            StoredSums<NT>(sums).store(acc[0]);
            __syncthreads();
            if (!finished.any()) continue;
#pragma unroll
            for (int s = 0; s < SPLITS; ++s) {
                if (SPLITS > 1 && pass * SPLITS + s >= p.split_k) break;
                float total[Shape::kShare];
                finished.add(sums + s * kChainWarps * 32 * Shape::kSums, total);
#pragma unroll
                for (int k = 0; k < Shape::kShare; ++k) y[k] = pass + s == 0 ? total[k] : __fadd_rn(y[k], total[k]);
            }
        }
        if constexpr (GATED) write_gated<16, GATED>(p, tile, 0, first_token, finished, y);
        else write_rows<16>(p, tile, 0, first_token, finished, y);
    }
}

// Last: the type of the third matrix, whose row tiles belong to the blocks from `last_block` on.
template <class Block, int SPLITS, int NT, int GATED, class Last = Block>
__global__ void __launch_bounds__(256 * SPLITS, 2 / SPLITS) matvec_mma(const __grid_constant__ MmaParams p) {
    extern __shared__ __align__(16) u8 shared[];
    const int block = blockIdx.y, blocks = gridDim.y, tiles = p.matrices[2].first_tile;
    if constexpr (kSame<Block, Last>)
        compute_tiles<Block, SPLITS, NT, GATED>(p, block, p.tiles, blocks, shared);
    else if (block < p.last_block)
        compute_tiles<Block, SPLITS, NT, false>(p, block, tiles, p.last_block, shared);
    else
        compute_tiles<Last, SPLITS, NT, false>(p, tiles + block - p.last_block, p.tiles, blocks - p.last_block, shared);
}
