// Decode of 16 rows and more: y_j[t] = W_j·x[t] + b_j + residual[t], or
// h[t] = gated(W_0·x[t] + b_0, W_1·x[t] + b_1), on the tensor cores, with the bits of matvec.cu and
// glu.cu.
//
// Shapes: W_j [rows_j, cols] in planes, of type Block, the third one of type Last; b_j [rows_j], residual [T, rows] and y_j
// [T, rows_j] f32; x as Q8 blocks (q8_activations.cuh) with a factor for each row; h as f32 and as
// Q8 blocks (q and meta are null unless rows is a multiple of 32).
// Grid: x over tiles of 8·NT·WARPS_N tokens, y over row tiles, which a block takes gridDim.y apart,
// so that its loads run ahead over their ends; 32·WARPS_K·WARPS_M·WARPS_N threads. A row tile is
// 16·FRAGS_M·WARPS_M rows of one matrix, with GATED half of them of each of both: of 16 rows of an
// MMA the first 8 are of W_0, the others of W_1. A tile of 64 rows is 32 elements, one Q8 block.
// Alignment: planes and q 16 bytes. Dynamic shared memory: StageShape::kBytes. Bytes: each weight
// once for each tile of tokens, 16-byte loads; q and meta once for each row tile.
// Order and rounding: vec_dot.cuh, then splits ascending, then fma(sum, factor, bias + residual).
// Twins: `norm_linear`, `linear_add`, `norm_glu` in worker/cpu/ops.py; tests/quantized_ops.py.
// Launcher: worker/gpu/matvec_mma.py.
#include "gated.cuh"
#include "matvec_mma_stages.cuh"
#include "matvec_mma_sums.cuh"
#include "pdl.cuh"

struct MmaMatrix {
    Planes planes;
    const float* bias;      // [rows] or null
    const float* residual;  // [T, rows] or null
    float* out;             // [T, rows]; with GATED h, in the first matrix
    int rows, first_tile;   // the row tiles of a matrix follow those of the one before
};

struct MmaParams {
    MmaMatrix matrices[3];
    Q8Rows x;
    Gate gate;
    u8* q;  // h as Q8 blocks, or null
    Meta* meta;
    int tiles, split_k, last_block, padding;
};

// A row of a tile: its matrix, and its row there (which may be past the last one).
template <class Shape, bool GATED>
struct TileRow {
    int matrix, row;
    __device__ __forceinline__ TileRow(const MmaParams& p, int tile, int r) {
        if (GATED) {
            matrix = r / 8 % 2, row = Shape::kRows / 2 * tile + r / 16 * 8 + r % 8;
        } else {
            matrix = (tile >= p.matrices[1].first_tile) + (tile >= p.matrices[2].first_tile);
            row = Shape::kRows * (tile - p.matrices[matrix].first_tile) + r;
        }
    }
};

template <class Shape, int FRAGS_M, int NT, int SHARE, class Place>
__device__ __forceinline__ void write_rows(const MmaParams& p, int tile, int first_token, const Place& warp,
                                           const float (&y)[SHARE]) {
    using Stored = StoredSums<FRAGS_M, NT>;
#pragma unroll
    for (int k = 0; k < SHARE; ++k) {
        const int index = warp.k * SHARE + k;
        const TileRow<Shape, false> r(p, tile, 16 * FRAGS_M * warp.m + Stored::row(index));
        const MmaMatrix& m = p.matrices[r.matrix];
        const int t = first_token + 8 * NT * warp.n + Stored::token(index);
        if (r.row >= m.rows || t >= p.x.rows) continue;
        float addend = m.bias ? m.bias[r.row] : 0.f;
        if (m.residual) addend = __fadd_rn(addend, m.residual[(size_t)t * m.rows + r.row]);
        m.out[(size_t)t * m.rows + r.row] = __fmaf_rn(y[k], p.x.factor ? p.x.factor[t] : 1.f, addend);
    }
}

// `shared`: [kTokens][elements + 1] of gate and up, that of `close_split`.
template <class Shape, int FRAGS_M, int NT, int SHARE, class Place>
__device__ __forceinline__ void write_gated(const MmaParams& p, int tile, int first_token, const Place& warp,
                                            const float (&y)[SHARE], float* shared) {
    using Stored = StoredSums<FRAGS_M, NT>;
    constexpr int kElements = Shape::kRows / 2, kStride = kElements + 1;
    static_assert(kElements == 32, "an element a lane, one Q8 block");
    const int lane = threadIdx.x % 32, rows = p.matrices[0].rows, column = kElements * tile + lane;
    float2* const pairs = reinterpret_cast<float2*>(shared);
    __syncthreads();  // `close_split` has read its sums
#pragma unroll
    for (int k = 0; k < SHARE; k += 2) {
        const int index = warp.k * SHARE + k, row = Stored::row(index);
        const int t = 8 * NT * warp.n + Stored::token(index);
        pairs[t * kStride + 8 * FRAGS_M * warp.m + row / 16 * 8 + row % 8] = make_float2(y[k], y[k + 1]);
    }
    __syncthreads();
    float bias[2];
#pragma unroll
    for (int b = 0; b < 2; ++b) {
        const float* from = p.matrices[b].bias;
        bias[b] = from && column < rows ? from[column] : 0.f;
    }
#pragma unroll 1
    for (int t = threadIdx.x / 32; t < Shape::kTokens && first_token + t < p.x.rows; t += Shape::kWarps) {
        const size_t row = first_token + t;
        const float factor = p.x.factor ? p.x.factor[row] : 1.f;
        const float2 pair = pairs[t * kStride + lane];
        const bool valid = column < rows;
        const float h = valid ? gated(__fmaf_rn(pair.x, factor, bias[0]), __fmaf_rn(pair.y, factor, bias[1]), p.gate) : 0.f;
        if (valid) p.matrices[0].out[row * rows + column] = h;
        if (p.q) store_quantized_lane(h, column, rows, p.q + row * rows, p.meta + row * (rows / 32));
    }
}

// The row tiles `first_tile`, `first_tile` + `stride`, … before `end`.
template <class Block, int WARPS_K, int WARPS_M, int WARPS_N, int FRAGS_M, int NT, int AHEAD, bool GATED>
__device__ __forceinline__ void compute_tiles(const MmaParams& p, int first_tile, int end, int stride, u8* shared) {
    using Shape = StageShape<Block, WARPS_K, WARPS_M, WARPS_N, FRAGS_M, NT>;
    using Copies = StageCopies<Block, Shape>;
    constexpr int kShare = Shape::kLaneSums / WARPS_K, kLoads = Shape::kLoads;
    static_assert(kShare >= (GATED ? 2 : 1), "gate and up of an element are in one lane");
    const WarpPlace<WARPS_K, WARPS_M> warp;
    Copies copies(p.x, blockIdx.x * Shape::kTokens);
    const int units = copies.units, blocks = (units + 31) / 32;
    float* const levels = reinterpret_cast<float*>(shared + Shape::kSumsAt);
    const StoredSums<FRAGS_M, NT> lower(levels), upper(levels + (Shape::kLevels - 1) * Shape::kLevel / 4);

    StageWalk<WARPS_K> ahead{first_tile, 0, 0, 0};  // the stage whose weights are loaded next
    StageWalk<WARPS_K> x_ahead = ahead;                 // the stage whose activations are loaded next
    u32 first_units[kLoads];                            // of this thread's rows of the tile of `ahead`
    int matrix = 0;  // of all of them: they are a multiple of 16 rows apart
    const auto find_rows = [&] {
        if (ahead.tile >= end) return;
#pragma unroll
        for (int k = 0; k < kLoads; ++k) {
            const TileRow<Shape, GATED> r(p, ahead.tile, Copies::row() + k * Copies::kStride);
            matrix = r.matrix;
            first_units[k] = (u32)min(r.row, p.matrices[r.matrix].rows - 1) * units;
        }
    };
    // Load the weights of the next stage, and return its first unit.
    const auto load_weights = [&](Unit<Block> (&to)[kLoads]) {
        const int base = ahead.base();
#pragma unroll
        for (int k = 0; k < kLoads; ++k)  // past the last tile the last rows again
            to[k].load(p.matrices[matrix].planes, first_units[k] + copies.unit(base));
        ahead.advance(blocks, p.split_k, stride, find_rows);
        return base;
    };
    // Load q of the next stage to a buffer, and its first unit.
    const auto load_q = [&](int buffer) {
        const int base = x_ahead.base();
        copies.fetch_q(base, shared + Shape::kQsAt + buffer * Shape::kQBuffer);
        x_ahead.advance(blocks, p.split_k, stride, [] {});
        return base;
    };
    const auto store_weights = [&](const Unit<Block> (&from)[kLoads], int base, u8* buffer) {
#pragma unroll
        for (int k = 0; k < kLoads; ++k) copies.store_weights(from[k], copies.unit(base), k, buffer);
    };
    // Before the wait (pdl.cuh): weights, constant during a step. Registers that loads fill are
    // chosen by the parity of the stage: a move would wait for the load.
    Unit<Block> loaded[2][kLoads];
    find_rows();
    const int first = load_weights(loaded[0]);
    launch_dependents();
    grid_dependency_wait();
    copies.template load_meta<0>(load_q(0));
    copies.template load_meta<1>(load_q(1));
    store_weights(loaded[0], first, shared);
    copies.template store_meta<0>(shared);
    wait_for_copies<1>();
    __syncthreads();
    int next = 0, stage = 0, q_stage = 0;  // first unit of the next stage, if its weights are loaded; current buffers
    if (AHEAD == 2) next = load_weights(loaded[1]);
    for (int tile = first_tile; tile < end; tile += stride) {
        float y[kShare];
        for (int split = 0; split < p.split_k; ++split) {
            Sums<FRAGS_M, NT> a, b;
#pragma unroll 1
            for (int pair = 0; pair < Shape::kPairs; ++pair) {
#pragma unroll
                for (int i = 0; i < Shape::kLaneSums; ++i) (&a[0][0][0])[i] = (&b[0][0][0])[i] = 0.f;
                int block = split;
#pragma unroll 1
                do {
                    const int x_base = load_q(q_stage == 0 ? 2 : q_stage - 1);
                    int after = 0;
                    if (AHEAD == 1) next = load_weights(loaded[0]);
                    if (stage == 0) {
                        copies.template load_meta<0>(x_base);
                        if (AHEAD == 2) after = load_weights(loaded[0]);
                    } else {
                        copies.template load_meta<1>(x_base);
                        if (AHEAD == 2) after = load_weights(loaded[1]);
                    }
                    const u8* const from = shared + stage * Shape::kBuffer;
                    const u8* const q = shared + Shape::kQsAt + q_stage * Shape::kQBuffer;
                    const auto multiply = [&](int slot, Sums<FRAGS_M, NT>& acc) {
                        const u8* const scales = from + Shape::kScalesAt + slot * Shape::kScales;
                        const u8* const meta = from + Shape::kMetaAt + slot * Shape::kMeta;
                        multiply_unit<Block, FRAGS_M, NT>(
                            from + slot * Shape::kCodes + code_offset(16 * FRAGS_M * warp.m, 0),
                            reinterpret_cast<const float*>(scales) + scale_offset<Block>(16 * FRAGS_M * warp.m),
                            q + slot * Shape::kQ + q_offset(8 * NT * warp.n, 0),
                            reinterpret_cast<const float*>(meta) + 8 * NT * warp.n, Shape::kTokens, acc);
                    };
                    multiply(warp.k, a);
                    multiply(warp.k + WARPS_K, b);
                    stage ^= 1, q_stage = q_stage == 2 ? 0 : q_stage + 1;
                    u8* const to = shared + stage * Shape::kBuffer;
                    if (stage == 0) {
                        copies.template store_meta<0>(to);
                        if (AHEAD == 2) store_weights(loaded[0], next, to);
                    } else {
                        copies.template store_meta<1>(to);
                        if (AHEAD == 2) store_weights(loaded[1], next, to);
                    }
                    if (AHEAD == 1) store_weights(loaded[0], next, to);
                    wait_for_copies<1>();
                    __syncthreads();
                    if (AHEAD == 2) next = after;
                    block += p.split_k;
                } while (block < blocks);
#pragma unroll
                for (int i = 0; i < Shape::kLaneSums; ++i)
                    (&a[0][0][0])[i] = __fadd_rn((&a[0][0][0])[i], (&b[0][0][0])[i]);
                // The lower levels of the tree: pairs are in bit-reversed order.
                if (pair % 2) lower.add_to(a);
                if (pair == 3) upper.add_to(a);
                if (Shape::kPairs > 1 && pair % 2 == 0) lower.store(a);
                if (Shape::kPairs == 4 && pair == 1) upper.store(a);
            }
            close_split<WARPS_K, FRAGS_M, NT, kShare>(a, levels, split == 0, units < 32 * (split + 1), y);
        }
        const int first_token = blockIdx.x * Shape::kTokens;
        if constexpr (GATED)
            write_gated<Shape, FRAGS_M, NT, kShare>(p, tile, first_token, warp, y, levels);
        else
            write_rows<Shape, FRAGS_M, NT, kShare>(p, tile, first_token, warp, y);
    }
}

// Last: the type of the third matrix, whose row tiles belong to the blocks from `last_block` on.
template <class Block, int WARPS_K, int WARPS_M, int WARPS_N, int FRAGS_M, int NT, int AHEAD, bool GATED,
          class Last = Block>
__global__ void __launch_bounds__(32 * WARPS_K * WARPS_M * WARPS_N,
                                  (FRAGS_M * NT > 8 ? 8 : 16) / (WARPS_K * WARPS_M * WARPS_N))
    matvec_mma(const __grid_constant__ MmaParams p) {
    extern __shared__ __align__(16) u8 shared[];
    const int block = blockIdx.y, blocks = gridDim.y, tiles = p.matrices[2].first_tile;
    if constexpr (kSame<Block, Last>)
        compute_tiles<Block, WARPS_K, WARPS_M, WARPS_N, FRAGS_M, NT, AHEAD, GATED>(p, block, p.tiles, blocks, shared);
    else if (block < p.last_block)
        compute_tiles<Block, WARPS_K, WARPS_M, WARPS_N, FRAGS_M, NT, AHEAD, GATED>(p, block, tiles, p.last_block, shared);
    else
        compute_tiles<Last, WARPS_K, WARPS_M, WARPS_N, FRAGS_M, NT, AHEAD, GATED>(
            p, tiles + block - p.last_block, p.tiles, blocks - p.last_block, shared);
}
