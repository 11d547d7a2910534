// Prefill: y[t] = W·x[t] + b + residual[t] on tensor cores; each weight is converted to f16 in
// registers once a tile.
//
// W is A and x is B of m16n8k16 MMAs. A warp computes 16·FRAGS_M rows × TILE_N tokens of y; with
// GLU, half as many rows of a gate and the same rows of its `up`, gated in registers: those that
// are adjacent in h (fragments.cuh). A block is
// WARPS_M warps side by side along the rows, SPLIT_K times along K; each works PASSES passes over
// K. Of the SPLIT_K·PASSES splits, split s takes the steps s, s + SPLIT_K·PASSES, … of 128 columns
// (sum of splits: split_k.cuh). Weights go from global memory to registers: a lane loads whole
// units of its 2·FRAGS_M rows, the next ones while the tensor cores work on the current ones
// (column order: fragments.cuh). x goes through shared memory by cp.async, STAGES - 1 steps ahead.
// Each y[t, r] is the same chain of MMAs whatever else is in the launch: its bits depend on token t
// alone.
// Shapes: x [*, padded cols] f16, a power of two for each row in scale [*] (null: 1); y [T, rows]
// f32, with GLU h [T, padded rows] f16, the next product's x, divided by the power of two
// h_scale [T]; residual [T, rows] or null. cols is a multiple of 32. Of the T tokens the first *count are
// valid (null: all); results of the others are not written.
// Last: type of the third projection where the first two have another.
// EXPERTS: grid y over tiles of rows of one expert each (slot_tiles.cuh, written by
// group_routes.cu); row i reads x[i] and writes y[i] or y[order[i]]; W is [E, rows, cols], b [E,
// rows].
// Grid: x over the rows of up to three projections of one x, y over tokens/TILE_N;
// 32·WARPS_M·SPLIT_K threads.
// Alignment: planes and x 16 bytes. Dynamic shared memory: 256·STAGES·TILE_N·SPLIT_K bytes, rows of
// 256 bytes with 16-byte chunk c stored at c ^ (row & 7), free of bank conflicts; with PASSES > 1
// also 64·FRAGS_M·WARPS_M·TILE_N·SPLIT_K for the saved sums.
// Bytes: weights once a tile of tokens, x once a tile of rows.
// Twins: `matmul`, `gated` in worker/cpu/plain.py; tests/quantized_ops.py. Launcher:
// worker/gpu/matmul.py.
#include "pdl.cuh"
#include "fragments.cuh"
#include "split_k.cuh"
#include "mma.cuh"
#include "matmul_tile.cuh"

constexpr int kRowBytes = 2 * kColumnGroup, kStepMmas = kColumnGroup / 16;  // a step is 128 columns

// acc += weights·x over the columns of unit k of a step. Tokens from `valid` on do not exist; a
// column of an MMA's result depends on its own column of B only, so with FULL they are computed too
// and nothing branches.
template <bool FULL, class Block, int FRAGS_M, int TILE_N, int GLU>
__device__ __forceinline__ void multiply_unit(const WeightIterator<Block, FRAGS_M, GLU>& weights,
                                              const Unit<Block> (&units)[2 * FRAGS_M], int step, int unit, u32 x_lane,
                                              int valid, Accumulator<FRAGS_M, TILE_N>& acc) {
    constexpr int kMmas = kStepMmas / WeightIterator<Block, FRAGS_M, GLU>::kUnits;
#pragma unroll
    for (int k = 0; k < kMmas; ++k) {
        u32 a[FRAGS_M][4];
#pragma unroll
        for (int i = 0; i < 2 * FRAGS_M; ++i) {
            u32 h[2 * kMmas];  // this MMA uses two of them
            units[i].to_half2(weights.unit(i, step, unit), h);
            a[i / 2][i % 2] = h[2 * k], a[i / 2][i % 2 + 2] = h[2 * k + 1];
        }
#pragma unroll
        for (int n = 0; n < TILE_N / 16; ++n) {
            if (!FULL && 16 * n >= valid) break;
            u32 b[4];
            load_matrices(b, (x_lane ^ (32 * (unit * kMmas + k))) + n * 16 * kRowBytes);
#pragma unroll
            for (int m = 0; m < FRAGS_M; ++m) {
                mma_16x8x16(acc[m][2 * n], a[m], b[0], b[1]);
                mma_16x8x16(acc[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// acc += the product of one split of K. `wait_for_x` is called between the first loads of weights
// and those of x.
template <bool FULL, class Block, int WARPS_M, int SPLIT_K, int PASSES, int STAGES, int TILE_N, int GLU, int FRAGS_M,
          class Wait>
__device__ __forceinline__ void accumulate_split(const Projection* projections, int cols, const u16* x,
                                                 const TokenTile<TILE_N>& tokens, int row0, int pass, u8* buffers,
                                                 Accumulator<FRAGS_M, TILE_N>& acc, Wait wait_for_x) {
    constexpr int kThreads = 32 * WARPS_M, kTileBytes = TILE_N * kRowBytes;
    constexpr int kUnits = WeightIterator<Block, FRAGS_M, GLU>::kUnits;
    constexpr int kAhead = STAGES - 1, kSplits = SPLIT_K * PASSES;
    const int warp_k = threadIdx.x / kThreads, thread = threadIdx.x % kThreads, lane = threadIdx.x % 32;
    const int steps = (cols + kColumnGroup - 1) / kColumnGroup, valid = tokens.tile.count, split = warp_k * PASSES + pass;
    const u32 own = (u32)__cvta_generic_to_shared(buffers) + warp_k * STAGES * kTileBytes;
    constexpr int kCopyStride = kThreads / 16;  // tokens between a thread's copies: a power of two
    static_assert(TILE_N % kCopyStride == 0, "all threads copy the same number of chunks");
    const int token0 = thread / 16, chunk = thread % 16;
    const u32 to = own + token0 * kRowBytes + (chunk ^ (token0 & 7)) * 16;
    const auto fetch_x = [&](int step, int stage) {
        const u16* const from = x + step * kColumnGroup + chunk * 8;
#pragma unroll
        for (int i = 0; step < steps && i < TILE_N / kCopyStride; ++i) {
            const u32 at = (to ^ (kCopyStride * i & 7) * 16) + stage * kTileBytes + i * kCopyStride * kRowBytes;
            if (FULL || token0 + i * kCopyStride < valid)
                copy_16_async(at, from + tokens.x_rows[token0 + i * kCopyStride], true);
        }
        commit_copies();
    };
    const WeightIterator<Block, FRAGS_M, GLU> weights(projections, cols, tokens.tile.expert, row0);
    // The step of the i-th unit of this split; the last step where the columns end before it.
    const auto step_of = [&](int i) { return min(split + kSplits * (i / kUnits), steps - 1); };
    Unit<Block> current[2 * FRAGS_M], prefetched[kAhead][2 * FRAGS_M];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) weights.load(projections, step_of(a), a % kUnits, prefetched[a]);
    wait_for_x(pass);
#pragma unroll
    for (int a = 0; a < kAhead; ++a) fetch_x(split + kSplits * a, a);
    const int in_tile = (lane / 16 * 8 + lane % 8) * kRowBytes + ((lane / 8 % 2) ^ (lane % 8)) * 16;
    for (int first = 0, stage = 0, at = 0; first < steps; first += kSplits, stage = stage == kAhead ? 0 : stage + 1) {
        const int step = first + split;
        wait_for_copies<kAhead - 1>();
        __syncthreads();  // the buffer of the previous step is not read any more
        fetch_x(step + kSplits * kAhead, stage == 0 ? kAhead : stage - 1);
        if (step >= steps) continue;
        const u32 x_lane = own + stage * kTileBytes + in_tile;
#pragma unroll 1
        for (int unit = 0; unit < kUnits; ++unit, ++at) {
            weights.advance(projections, step_of(at + kAhead), (unit + kAhead) % kUnits, current, prefetched);
            multiply_unit<FULL, Block, FRAGS_M, TILE_N, GLU>(weights, current, step, unit, x_lane, valid, acc);
        }
    }
}

// Minimum of blocks a multiprocessor, 0 for no minimum: small tiles of experts wait for weights, so
// loads in flight count. The code for sm_100 needs more registers than four blocks leave.
template <class Block>
__host__ __device__ constexpr int min_blocks(int tile_n, bool experts) {
#if __CUDA_ARCH__ >= 1000
    return 0;
#else
    return experts && tile_n <= 32 && sizeof(Unit<Block>) <= 32 ? (kSame<Block, MXFP4> ? 4 : 3) : 0;
#endif
}

// A block's tile of y: this warp's rows of `projections` from `row0` on, the tokens of `tokens`.
template <class Block, int FRAGS_M, int WARPS_M, int SPLIT_K, int PASSES, int TILE_N, int STAGES, int GLU, class Wait>
__device__ __forceinline__ void compute_tile(const MatmulParams& p, const Projection* projections, const u16* x,
                                             const TokenTile<TILE_N>& tokens, int row0, u8* shared, Wait wait_for_x) {
    Accumulator<FRAGS_M, TILE_N> acc = {};
    constexpr bool kLarge = TILE_N > 64;  // such a tile has no registers left for branches
    float4* const saved = reinterpret_cast<float4*>(shared + kRowBytes * STAGES * TILE_N * SPLIT_K);
    for (int pass = 0;;) {
        if (kLarge || tokens.tile.count > TILE_N - 16)
            accumulate_split<true, Block, WARPS_M, SPLIT_K, PASSES, STAGES, TILE_N, GLU>(
                projections, p.cols, x, tokens, row0, pass, shared, acc, wait_for_x);
        else
            accumulate_split<kLarge, Block, WARPS_M, SPLIT_K, PASSES, STAGES, TILE_N, GLU>(
                projections, p.cols, x, tokens, row0, pass, shared, acc, wait_for_x);
        if constexpr (PASSES == 1) break;
        carry_pass<PASSES, 32 * WARPS_M * SPLIT_K>(saved + threadIdx.x, pass, acc);
        if (++pass == PASSES) break;
        __syncthreads();  // the buffers of this pass are not read any more
    }
    if constexpr (SPLIT_K == 1) {
        write<TILE_N, FRAGS_M, TILE_N, GLU>(p, projections, tokens, 0, row0, acc);
    } else {
        constexpr int kReduced = reduced_tokens(TILE_N, SPLIT_K);
        const int token0 = threadIdx.x / 32 / WARPS_M * kReduced;
        Accumulator<FRAGS_M, kReduced> sums;
        reduce_splits<WARPS_M, SPLIT_K, FRAGS_M, TILE_N, kReduced>(reinterpret_cast<float4*>(shared), acc, sums);
        if (token0 < TILE_N) write<TILE_N, FRAGS_M, kReduced, GLU>(p, projections, tokens, token0, row0, sums);
    }
}

template <class Block, int FRAGS_M, int WARPS_M, int SPLIT_K, int PASSES, int TILE_N, int STAGES, bool EXPERTS, int GLU,
          class Last = Block>
__global__ void __launch_bounds__(32 * WARPS_M * SPLIT_K, min_blocks<Block>(TILE_N, EXPERTS))
    matmul(const __grid_constant__ MatmulParams p, const u16* __restrict__ x, const int n_tokens,
           const SlotTiles tiles) {
    extern __shared__ __align__(256) u8 shared[];
    __shared__ TokenTile<TILE_N> tokens;
    const int first = blockIdx.y * TILE_N;
    // Before the wait (pdl.cuh), for a dense matrix: *count, which no kernel writes, and weights,
    // constant during a step.
    if (EXPERTS) grid_dependency_wait();
    const SlotTile tile = EXPERTS ? tile_of<TILE_N>(tiles, blockIdx.y)
                                  : SlotTile{0, first, min(TILE_N, (p.count ? *p.count : n_tokens) - first)};
    if (tile.count <= 0) return;
    if (threadIdx.x == 0) tokens.tile = tile;
    for (int i = threadIdx.x; i < TILE_N; i += 32 * WARPS_M * SPLIT_K) {
        const int row = tile.first + min(i, tile.count - 1);
        tokens.slots[i] = EXPERTS && tiles.order ? tiles.order[row] : row;
        tokens.x_rows[i] = (u32)row * padded(p.cols);
    }
    __syncthreads();
    const auto wait_for_x = [&](int pass) {
        if (pass > 0) return;
        if (!EXPERTS) grid_dependency_wait();
        for (int i = threadIdx.x; i < TILE_N; i += 32 * WARPS_M * SPLIT_K) {
            const int row = tile.first + min(i, tile.count - 1);
            tokens.scales[i] = p.scale ? p.scale[row] : 1.f;
            if (p.h_scale) tokens.h_inverses[i] = __frcp_rn(p.h_scale[row]);
        }
    };
    const Projection* projections = p.projections;
    if (!GLU && !EXPERTS)
        projections += (blockIdx.x >= p.projections[1].first_block) + (blockIdx.x >= p.projections[2].first_block);
    const int warp = threadIdx.x / 32;
    const int row0 = ((blockIdx.x - projections->first_block) * WARPS_M + warp % WARPS_M) * (GLU ? 8 : 16) * FRAGS_M;
    if (kSame<Block, Last> || projections != p.projections + 2)
        compute_tile<Block, FRAGS_M, WARPS_M, SPLIT_K, PASSES, TILE_N, STAGES, GLU>(p, projections, x, tokens, row0,
                                                                                    shared, wait_for_x);
    else
        compute_tile<Last, FRAGS_M, WARPS_M, SPLIT_K, PASSES, TILE_N, STAGES, GLU>(p, projections, x, tokens, row0,
                                                                                   shared, wait_for_x);
}
