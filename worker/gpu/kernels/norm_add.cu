// RMSNorm of a product's result before it is added to the residual stream.
//
//   x[t] = residual[t] + y[t] / sqrt(mean(y[t]²) + eps) · weight   (arXiv:1910.07467)
// With SCALED the sum is multiplied by scale.
// Shapes: y, residual, x [T, cols] f32, weight [cols] f32; cols is a multiple of 4. Rows from *count
// on are not written; count may be null.
// Grid: (T), NORM_THREADS threads: a block a row, four adjacent elements a thread, KEPT times in
// registers (4·NORM_THREADS·KEPT columns); further columns are read twice. Alignment: 16 bytes.
// Bytes: 12·cols a row.
// Order and rounding: normed_sum.cuh.
// Twin: `linear_norm_add` in worker/cpu/ops.py. Launcher: worker/gpu/norms.py.
#include "normed_sum.cuh"
#include "pdl.cuh"

template <int KEPT, bool SCALED>
__global__ void __launch_bounds__(NORM_THREADS)
    norm_add(float4* x, const float4* y, const float4* weight, const float4* residual, const int* count, int cols,
             float eps, float scale) {
    // Before the wait (pdl.cuh): *count, which no kernel writes, and norm weights, constant during a
    // step.
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
    const float factor = norm_factor(squares, cols, eps);
    const auto store = [&](int i, float4 v, float4 w, float4 r) {
        const float4 sum = add_normed(r, v, factor, w);
        x[row + i] = SCALED ? scaled(sum, scale) : sum;
    };
#pragma unroll
    for (int j = 0; j < KEPT; ++j)
        if (threadIdx.x + j * NORM_THREADS < quads) store(threadIdx.x + j * NORM_THREADS, v[j], w[j], r[j]);
#pragma unroll 1
    for (int i = threadIdx.x + KEPT * NORM_THREADS; i < quads; i += NORM_THREADS)
        store(i, y[row + i], weight[i], residual[row + i]);
}
