// RMSNorms of two results of a layer, their sum, its RMSNorm, and the addition to the residual
// stream.
//
//   u[t] = norm_a(a[t]) + norm_b(b[t]);  x[t] = (residual[t] + norm(u[t])) · scale
//   norm(y) = y / sqrt(mean(y²) + eps) · weight   (arXiv:1910.07467)
// Shapes: a, b, residual, x [T, cols] f32, weights [cols] f32; cols is a multiple of 4. Rows from
// *count on are not written; count may be null.
// Grid: (T), NORM_THREADS threads: a block a row, four adjacent elements a thread, KEPT times in
// registers (4·NORM_THREADS·KEPT columns); of further columns a and b are read three times.
// Alignment: 16 bytes. Bytes: 16·cols a row.
// Order and rounding: those of norm_add.cu for each norm; the sum u is rounded once.
// Twin: `branches_norm_add` in worker/cpu/ops.py. Launcher: worker/gpu/norms.py.
#include "pdl.cuh"
#include "warp.cuh"

constexpr int kWarps = NORM_THREADS / 32;

__device__ __forceinline__ float4 scaled(float4 v, float factor, float4 w) {
    return make_float4(__fmul_rn(__fmul_rn(v.x, factor), w.x), __fmul_rn(__fmul_rn(v.y, factor), w.y),
                       __fmul_rn(__fmul_rn(v.z, factor), w.z), __fmul_rn(__fmul_rn(v.w, factor), w.w));
}

__device__ __forceinline__ float4 sum_of(float4 a, float4 b) {
    return make_float4(__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y), __fadd_rn(a.z, b.z), __fadd_rn(a.w, b.w));
}

// 1/rms of a row from each thread's sum of squares. Each call of a kernel has its own `warps`.
__device__ __forceinline__ float factor_of(float squares, int cols, float eps, float (&warps)[kWarps]) {
    squares = warp_sum(squares);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = squares;
    __syncthreads();
    squares = 0.f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) squares = __fadd_rn(squares, warps[i]);
    return __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(squares, (float)cols), eps)));
}

template <int KEPT>
__global__ void __launch_bounds__(NORM_THREADS)
    branches_norm_add(float4* x, const float4* a, const float4* a_weight, const float4* b, const float4* b_weight,
                      const float4* weight, const float4* residual, const int* count, int cols, float a_eps,
                      float b_eps, float eps, float scale) {
    __shared__ float warps[3][kWarps];
    // Before the wait (pdl.cuh): *count, which no kernel writes.
    if (count && blockIdx.x >= *count) return;
    const int quads = cols / 4;
    const size_t row = (size_t)blockIdx.x * quads;
    float4 u[KEPT], v[KEPT];
    float a_squares = 0.f, b_squares = 0.f, squares = 0.f;
    grid_dependency_wait();
#pragma unroll
    for (int j = 0; j < KEPT; ++j) {
        const int i = threadIdx.x + j * NORM_THREADS;
        if (i < quads) u[j] = a[row + i], v[j] = b[row + i];
    }
#pragma unroll
    for (int j = 0; j < KEPT; ++j) {
        if (threadIdx.x + j * NORM_THREADS >= quads) continue;
        a_squares = __fadd_rn(a_squares, sum_of_squares(u[j]));
        b_squares = __fadd_rn(b_squares, sum_of_squares(v[j]));
    }
#pragma unroll 1
    for (int i = threadIdx.x + KEPT * NORM_THREADS; i < quads; i += NORM_THREADS) {
        a_squares = __fadd_rn(a_squares, sum_of_squares(a[row + i]));
        b_squares = __fadd_rn(b_squares, sum_of_squares(b[row + i]));
    }
    const float a_factor = factor_of(a_squares, cols, a_eps, warps[0]);
    const float b_factor = factor_of(b_squares, cols, b_eps, warps[1]);
    const auto sum_at = [&](int i, float4 a, float4 b) {
        return sum_of(scaled(a, a_factor, a_weight[i]), scaled(b, b_factor, b_weight[i]));
    };
#pragma unroll
    for (int j = 0; j < KEPT; ++j) {
        const int i = threadIdx.x + j * NORM_THREADS;
        if (i < quads) u[j] = sum_at(i, u[j], v[j]), squares = __fadd_rn(squares, sum_of_squares(u[j]));
    }
#pragma unroll 1
    for (int i = threadIdx.x + KEPT * NORM_THREADS; i < quads; i += NORM_THREADS)
        squares = __fadd_rn(squares, sum_of_squares(sum_at(i, a[row + i], b[row + i])));
    const float factor = factor_of(squares, cols, eps, warps[2]);
    const auto store = [&](int i, float4 u) {
        const float4 sum = sum_of(residual[row + i], scaled(u, factor, weight[i]));
        x[row + i] = make_float4(__fmul_rn(sum.x, scale), __fmul_rn(sum.y, scale), __fmul_rn(sum.z, scale),
                                 __fmul_rn(sum.w, scale));
    };
#pragma unroll
    for (int j = 0; j < KEPT; ++j)
        if (threadIdx.x + j * NORM_THREADS < quads) store(threadIdx.x + j * NORM_THREADS, u[j]);
#pragma unroll 1
    for (int i = threadIdx.x + KEPT * NORM_THREADS; i < quads; i += NORM_THREADS)
        store(i, sum_at(i, a[row + i], b[row + i]));
}
