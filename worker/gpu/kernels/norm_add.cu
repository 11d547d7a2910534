// RMSNorm of a product's result before it is added to the residual stream.
//
//   x[t] = residual[t] + y[t] / sqrt(mean(y[t]²) + eps) · weight   (arXiv:1910.07467)
// With SCALED the sum is multiplied by scale.
// Shapes: y, residual, x [T, cols] f32, weight [cols] f32; cols is a multiple of 4. Rows from
// *count on are not written; count may be null.
// Grid: (T), NORM_THREADS threads: a block a row, four adjacent elements a thread, KEPT times in
// registers (4·NORM_THREADS·KEPT columns); further columns are read twice. Alignment: 16 bytes.
// Bytes: 12·cols a row.
// Order and rounding: a thread's float4 ascending (sum_of_squares), the warp's butterfly, then
// warps ascending; as in the twin, the factor 1/sqrt is rounded twice, each product and sum once.
// Twin: `linear_norm_add` in worker/cpu/ops.py. Launcher: worker/gpu/norms.py.
#include "pdl.cuh"
#include "warp.cuh"

template <int KEPT, bool SCALED>
__global__ void __launch_bounds__(NORM_THREADS)
    norm_add(float4* x, const float4* y, const float4* weight, const float4* residual, const int* count, int cols,
             float eps, float scale) {
    constexpr int kWarps = NORM_THREADS / 32;
    __shared__ float warp_squares[kWarps];
    // Before the wait (pdl.cuh): *count, which no kernel writes, and norm weights, constant during
    // a step.
    if (count && blockIdx.x >= *count) return;
    const int quads = cols / 4;
    const size_t row = (size_t)blockIdx.x * quads;
    float4 w[KEPT], v[KEPT], r[KEPT];
#pragma unroll
    for (int j = 0; j < KEPT; ++j)
        if (threadIdx.x + j * NORM_THREADS < quads) w[j] = weight[threadIdx.x + j * NORM_THREADS];
    grid_dependency_wait();
    float squares = 0.f;
#pragma unroll
    for (int j = 0; j < KEPT; ++j) {
        const int i = threadIdx.x + j * NORM_THREADS;
        if (i < quads) v[j] = y[row + i], r[j] = residual[row + i];
    }
#pragma unroll
    for (int j = 0; j < KEPT; ++j)
        if (threadIdx.x + j * NORM_THREADS < quads) squares = __fadd_rn(squares, sum_of_squares(v[j]));
#pragma unroll 1
    for (int i = threadIdx.x + KEPT * NORM_THREADS; i < quads; i += NORM_THREADS)
        squares = __fadd_rn(squares, sum_of_squares(y[row + i]));
    squares = warp_sum(squares);
    if (threadIdx.x % 32 == 0) warp_squares[threadIdx.x / 32] = squares;
    __syncthreads();
    squares = 0.f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) squares = __fadd_rn(squares, warp_squares[i]);
    const float factor = __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(squares, (float)cols), eps)));
    const auto add = [&](float residual, float y, float weight) {
        const float sum = __fadd_rn(residual, __fmul_rn(__fmul_rn(y, factor), weight));
        return SCALED ? __fmul_rn(sum, scale) : sum;
    };
    const auto store = [&](int i, float4 v, float4 w, float4 r) {
        x[row + i] = make_float4(add(r.x, v.x, w.x), add(r.y, v.y, w.y), add(r.z, v.z, w.z), add(r.w, v.w, w.w));
    };
#pragma unroll
    for (int j = 0; j < KEPT; ++j)
        if (threadIdx.x + j * NORM_THREADS < quads) store(threadIdx.x + j * NORM_THREADS, v[j], w[j], r[j]);
#pragma unroll 1
    for (int i = threadIdx.x + KEPT * NORM_THREADS; i < quads; i += NORM_THREADS)
        store(i, y[row + i], weight[i], residual[row + i]);
}
