// Decode: y_j[t] = W_j·n[t] + b_j + residual[t], up to three matrices with one input in one launch
// (q, k and v).
//
// n is x or its RMSNorm, staged in shared memory by each block (stage_activations.cuh).
// Shapes: W_j [rows_j, cols] in planes, types A, B, C; b_j [rows_j], residual [T, rows] and y_j [T,
// rows_j] f32.
// Grid: x over the blocks of the first, second and third matrix, y over T; 512 threads. A matrix
// has `blocks` blocks, each with a contiguous range of its rows. Of the 16 warps of a block
// `split_k` (a power of two, fixed by the matrix's shape and type) share TILE_M rows along K and
// add their sums in ascending order.
// Without RELEASE_EARLY, dependents are released after the wait (pdl.cuh, rule 3).
// Alignment: planes and x 16 bytes. Dynamic shared memory: the staged row. Bytes: each weight once
// a token, 16-byte loads, TILE_M·UNROLL_K of them in flight a lane.
// Order and rounding: vec_dot.cuh, then splits ascending, then fma(sum, 1/rms, bias + residual).
// Twins: `norm_linear`, `linear_add` in worker/cpu/ops.py; tests/quantized_ops.py. Launcher:
// worker/gpu/matvec.py.
#define WEIGHTS_EVICT_FIRST
#include "vec_dot.cuh"
#include "pdl.cuh"
#include "matrix.cuh"

template <class Block, int TILE_M, int UNROLL_K, bool STAGE_Q8, bool STAGE_F32, bool RELEASE_EARLY>
__device__ __forceinline__ void multiply_rows(const Matrix& m, const InputRows& input, int split_k, u8* shared) {
    __shared__ float partial[2][kWarps][TILE_M];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row_groups = kWarps / split_k, row_group = warp / split_k;
    const int split = warp & (split_k - 1), row_units = input.cols / Unit<Block>::kElements;
    const int block = blockIdx.x - m.first_block;
    const int begin = (u32)m.rows * block / (u32)m.blocks, end = (u32)m.rows * (block + 1) / (u32)m.blocks;
    const float* residual = m.residual ? m.residual + (size_t)blockIdx.y * m.rows : nullptr;
    int row = begin + row_group * TILE_M;
    WeightFragment<Block, TILE_M, UNROLL_K> weights;
    const auto span_from = [&](int first) -> RowSpan {
        return {m.planes, m.planes, (u32)first * row_units, end - first, row_units, split, split_k};
    };
    const auto writes = [&](int first) { return split == 0 && lane < TILE_M && first + lane < end; };
    const auto load_addend = [&](int first) {
        float sum = 0.f;
        if (writes(first) && m.bias) sum = m.bias[first + lane];
        if (writes(first) && residual) sum = __fadd_rn(sum, residual[first + lane]);
        return sum;
    };
    // Before the wait (pdl.cuh): weights and norm weights, constant during a step.
    if (row < end) weights.load_first(span_from(row));
    prefetch_norm(input);
    StagedRows x;
    if (RELEASE_EARLY) launch_dependents();
    grid_dependency_wait();
    float next_addend = load_addend(row);
    const float factor = stage<STAGE_Q8, STAGE_F32>(input, blockIdx.y, 1, shared, x);
    for (int at = begin, buffer = 0; at < end; at += row_groups * TILE_M, row += row_groups * TILE_M, buffer ^= 1) {
        const float addend = next_addend;
        float sums[TILE_M] = {};
        if (row < end) weights.accumulate(sums, span_from(row), x);
        if (row + row_groups * TILE_M < end) weights.load_first(span_from(row + row_groups * TILE_M));
        next_addend = load_addend(row + row_groups * TILE_M);
        warp_sum_rows(sums);
        float y = sums[0];
#pragma unroll
        for (int r = 1; r < TILE_M; ++r) y = lane == r ? sums[r] : y;
        if (split_k > 1) {
            if (lane < TILE_M) partial[buffer][warp][lane] = y;
            __syncthreads();
            if (writes(row))
#pragma unroll 4
                for (int i = 1; i < split_k; ++i) y = __fadd_rn(y, partial[buffer][warp + i][lane]);
        }
        if (writes(row)) m.out[(size_t)blockIdx.y * m.rows + row + lane] = __fmaf_rn(y, factor, addend);
    }
}

template <int TILE_M, int UNROLL_K, class A, class B = A, class C = B, bool RELEASE_EARLY = true>
__global__ void __launch_bounds__(kThreads, 2)
    matvec(const Matrix a, const Matrix b, const Matrix c, const InputRows input, const int split_k) {
    extern __shared__ __align__(16) u8 shared[];
    constexpr bool kQ8 = kReadsQ8<A> || kReadsQ8<B> || kReadsQ8<C>;
    constexpr bool kF32 = !kReadsQ8<A> || !kReadsQ8<B> || !kReadsQ8<C>;
    const int block = blockIdx.x;
    if constexpr (kSame<A, B> && kSame<B, C>) {
        Matrix m = a;
        if (block >= b.first_block) m = b;
        if (block >= c.first_block) m = c;
        multiply_rows<A, TILE_M, UNROLL_K, kQ8, kF32, RELEASE_EARLY>(m, input, split_k, shared);
    } else if (block < (kSame<A, B> ? c : b).first_block) {
        Matrix m = a;
        if (kSame<A, B> && block >= b.first_block) m = b;
        multiply_rows<A, TILE_M, UNROLL_K, kQ8, kF32, RELEASE_EARLY>(m, input, split_k, shared);
    } else if (!kSame<A, B> && block < c.first_block) {
        multiply_rows<B, TILE_M, UNROLL_K, kQ8, kF32, RELEASE_EARLY>(b, input, split_k, shared);
    } else {
        multiply_rows<C, TILE_M, UNROLL_K, kQ8, kF32, RELEASE_EARLY>(c, input, split_k, shared);
    }
}
