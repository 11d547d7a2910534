// Prefill: x[t] = residual[t] + Σ_j weight[t, j]·y[t, j], in the order of the routes: the experts' way back.
//
// y [T, k, d], weights [T, k], residual and x [T, d] f32. Of the tokens the first *count are real; count may be null.
// A thread an element; grid x over d/256, y over tokens. Reads 4·(k + 1) bytes an element. Nothing is __restrict__: such
// loads could move above the wait (pdl.cuh). Twin: `experts_add` in worker/cpu/ops.py.
#include "pdl.cuh"

__global__ void combine(const float* y, const float* weights, const int* count, const int k, const int d,
                        const float* residual, float* x) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const size_t t = blockIdx.y;
    if (i >= d || (count && t >= *count)) return;
    grid_dependency_wait();
    float sum = residual[t * d + i];
    for (int j = 0; j < k; ++j) sum += weights[t * k + j] * y[(t * k + j) * d + i];
    x[t * d + i] = sum;
}
