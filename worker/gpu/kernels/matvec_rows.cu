// Decode of several rows: y_j[t] = W_j·n[t] + b_j + residual[t], up to three matrices with one
// input in one launch, each weight loaded once for T rows.
//
// Shapes: W_j [rows_j, cols] in planes, types A, B, C; b_j [rows_j], residual [R, rows] and y_j [R,
// rows_j] f32; n [R, cols] prepared (row_tiles.cuh).
// Grid: x over the blocks of the first, second and third matrix, y over ⌈R/T⌉; 512 threads. A
// matrix has `blocks` blocks, each with a contiguous range of its rows; `split_k` of the 16 warps
// share TILE_M rows along K, as in matvec.cu.
// Alignment: planes and rows 16 bytes. Dynamic shared memory: T staged rows. Bytes: each weight
// once for T rows.
// Order and rounding: those of matvec.cu for every row, so that a row's bits do not depend on R.
// Twins: `norm_linear`, `linear_add` in worker/cpu/ops.py; tests/quantized_ops.py. Launcher:
// worker/gpu/matvec.py.
#include "row_tiles.cuh"
#include "pdl.cuh"
#include "matrix.cuh"

template <class Block, int T, int TILE_M, int UNROLL_K, bool Q8, bool F32>
__device__ __forceinline__ void multiply_tile(const Matrix& m, const PreparedRows& input, int split_k, u8* shared) {
    constexpr int kSums = T * TILE_M, kLanes = 32 / kSums;  // lanes that get one sum
    static_assert(kSums <= 32, "a lane stores one sum");
    __shared__ float partial[2][kWarps][kSums], factors[T];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row_groups = kWarps / split_k, row_group = warp / split_k;
    const int split = warp & (split_k - 1), row_units = input.cols / Unit<Block>::kElements;
    const int block = blockIdx.x - m.first_block;
    const int begin = (u32)m.rows * block / (u32)m.blocks, end = (u32)m.rows * (block + 1) / (u32)m.blocks;
    const int t = T * blockIdx.y + lane / kLanes / TILE_M, r = lane / kLanes % TILE_M;  // of this lane's sum
    int row = begin + row_group * TILE_M;
    TileFragment<Block, TILE_M, UNROLL_K, T> weights;
    const auto span_from = [&](int first) -> RowSpan {
        return {m.planes, m.planes, (u32)first * row_units, end - first, row_units, split, split_k};
    };
    const auto writes = [&](int first) {
        return split == 0 && lane % kLanes == 0 && t < input.rows && first + r < end;
    };
    const auto load_addend = [&](int first) {
        float sum = 0.f;
        if (writes(first) && m.bias) sum = m.bias[first + r];
        if (writes(first) && m.residual) sum = __fadd_rn(sum, m.residual[(size_t)t * m.rows + first + r]);
        return sum;
    };
    // Before the wait (pdl.cuh): weights, constant during a step.
    if (row < end) weights.load_first(span_from(row));
    launch_dependents();
    grid_dependency_wait();
    float next_addend = load_addend(row);
    const StagedRows x = stage_tile<T, Q8, F32, true>(input, T * blockIdx.y, shared, factors);
    const float factor = factors[t % T];
    for (int at = begin, buffer = 0; at < end; at += row_groups * TILE_M, row += row_groups * TILE_M, buffer ^= 1) {
        const float addend = next_addend;
        float sums[kSums] = {};
        if (row < end) weights.accumulate(sums, span_from(row), x);
        if (row + row_groups * TILE_M < end) weights.load_first(span_from(row + row_groups * TILE_M));
        next_addend = load_addend(row + row_groups * TILE_M);
        float y = warp_sum_each(sums);
        if (split_k > 1) {
            if (lane % kLanes == 0) partial[buffer][warp][lane / kLanes] = y;
            __syncthreads();
            if (writes(row))
#pragma unroll 4
                for (int i = 1; i < split_k; ++i) y = __fadd_rn(y, partial[buffer][warp + i][lane / kLanes]);
        }
        if (writes(row)) m.out[(size_t)t * m.rows + row + r] = __fmaf_rn(y, factor, addend);
    }
}

template <int T, int TILE_M, int UNROLL_K, int BLOCKS, class A, class B = A, class C = B>
__global__ void __launch_bounds__(kThreads, BLOCKS)
    matvec_rows(const Matrix a, const Matrix b, const Matrix c, const PreparedRows input, const int split_k) {
    extern __shared__ __align__(16) u8 shared[];
    constexpr bool kQ8 = kReadsQ8<A> || kReadsQ8<B> || kReadsQ8<C>;
    constexpr bool kF32 = !kReadsQ8<A> || !kReadsQ8<B> || !kReadsQ8<C>;
    const int block = blockIdx.x;
    if constexpr (kSame<A, B> && kSame<B, C>) {
        Matrix m = a;
        if (block >= b.first_block) m = b;
        if (block >= c.first_block) m = c;
        multiply_tile<A, T, TILE_M, UNROLL_K, kQ8, kF32>(m, input, split_k, shared);
    } else if (block < (kSame<A, B> ? c : b).first_block) {
        Matrix m = a;
        if (kSame<A, B> && block >= b.first_block) m = b;
        multiply_tile<A, T, TILE_M, UNROLL_K, kQ8, kF32>(m, input, split_k, shared);
    } else if (!kSame<A, B> && block < c.first_block) {
        multiply_tile<B, T, TILE_M, UNROLL_K, kQ8, kF32>(b, input, split_k, shared);
    } else {
        multiply_tile<C, T, TILE_M, UNROLL_K, kQ8, kF32>(c, input, split_k, shared);
    }
}
