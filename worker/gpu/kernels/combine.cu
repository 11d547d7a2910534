// Prefill: x[t] = residual[t] + Σ_j weight[t, j]·y[t, j]: sum of the experts' results.
//
// Shapes: y [T, k, d], weights [T, k], residual (or null) and x [T, d] f32, d a multiple of 4. Of
// the tokens the first *count are valid; count may be null.
// Grid: x over ⌈d/1,024⌉, y over T; 256 threads, four adjacent elements each. Alignment: 16 bytes.
// Bytes: 4·(k + 2) an element.
// Order and rounding: fused multiply-adds in the order of the routes (experts_add.cu rounds each
// product first). Nothing is __restrict__: the compiler could move such loads above the wait
// (pdl.cuh).
// Twin: `experts_add` in worker/cpu/ops.py. Launcher: worker/gpu/matmul.py.
#include "pdl.cuh"

__global__ void combine(const float4* y, const float* weights, const int* count, const int k, const int quads,
                        const float4* residual, float4* x) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const size_t t = blockIdx.y;
    // Before the wait (pdl.cuh): *count, which no kernel writes.
    if (i >= quads || (count && t >= *count)) return;
    grid_dependency_wait();
    float4 sum = residual ? residual[t * quads + i] : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
    for (int j = 0; j < k; ++j) {
        const float weight = weights[t * k + j];
        const float4 v = y[(t * k + j) * quads + i];
        sum = make_float4(__fmaf_rn(weight, v.x, sum.x), __fmaf_rn(weight, v.y, sum.y), __fmaf_rn(weight, v.z, sum.z),
                          __fmaf_rn(weight, v.w, sum.w));
    }
    x[t * quads + i] = sum;
}
