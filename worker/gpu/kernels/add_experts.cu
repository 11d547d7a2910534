// Decode of several rows: x[r] = residual[r] + Σ_j y[r, j]: sum of the experts' weighted results.
//
// Shapes: y [R, k, d] (null if k is 0), residual (or null) and x [R, d] f32. An inactive row gets
// zeros.
// Grid: x over ⌈d/256⌉, y over R; 256 threads, one element each. Alignment: 4 bytes. Bytes: 4·(k +
// 2) an element. Order and rounding: each y is rounded, then added in the order of the routes, as
// in experts_add.cu. Nothing is __restrict__: the compiler could move such loads above the wait
// (pdl.cuh).
// Twin: `experts_add` in worker/cpu/ops.py. Launcher: worker/gpu/decode_experts.py.
#include "pdl.cuh"
#include "active_rows.cuh"

__global__ void __launch_bounds__(256)
    add_experts(const float* y, const ActiveRows active, const int k, const int d, const float* residual, float* x) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, r = blockIdx.y;
    launch_dependents();
    grid_dependency_wait();
    if (i >= d) return;
    float sum = 0.f;
    if (active[r]) {
        if (residual) sum = residual[(size_t)r * d + i];
        for (int j = 0; j < k; ++j) sum = __fadd_rn(sum, y[((size_t)r * k + j) * d + i]);
    }
    x[(size_t)r * d + i] = sum;
}
