// Prefill: x[t] = residual[t] + Σ_j weight[t, j]·y[t, j]: sum of the experts' results.
//
// Shapes: y [T, k, d], weights [T, k], residual (or null) and x [T, d] f32. Of the tokens the first *count
// are valid; count may be null.
// Grid: x over ⌈d/256⌉, y over T; 256 threads, one element each. Alignment: 4 bytes. Bytes: 4·(k +
// 2) an element.
// Order and rounding: fused multiply-adds in the order of the routes (experts_add.cu rounds each
// product first). Nothing is __restrict__: the compiler could move such loads above the wait
// (pdl.cuh).
// Twin: `experts_add` in worker/cpu/ops.py. Launcher: worker/gpu/matmul.py.
#include "pdl.cuh"

__global__ void combine(const float* y, const float* weights, const int* count, const int k, const int d,
                        const float* residual, float* x) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const size_t t = blockIdx.y;
    // Before the wait (pdl.cuh): *count, which no kernel writes.
    if (i >= d || (count && t >= *count)) return;
    grid_dependency_wait();
    float sum = residual ? residual[t * d + i] : 0.f;
    for (int j = 0; j < k; ++j) sum = __fmaf_rn(weights[t * k + j], y[(t * k + j) * d + i], sum);
    x[t * d + i] = sum;
}
