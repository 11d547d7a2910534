// RMSNorm of each value head, without a weight.
//
//   y[t, h] = x[t, h] / sqrt(mean(x[t, h]²) + eps)
// Shapes: x, y [T, Hk·D] f32. x may be the keys before head_norms.cu.
// Grid (T, ⌈Hk / HEAD_WARPS⌉), block 32·HEAD_WARPS: a warp a head, elements lane, lane + 32, … in
// registers. Alignment: 4 bytes. Bytes: 8 an element. Everything is read after the wait.
// Order and rounding: as head_norms.cu.
// Twin: `CpuOps.attention` in worker/cpu/ops.py. Launcher: worker/gpu/head_norms.py.
#include "pdl.cuh"
#include "warp.cuh"

template <int D>
__global__ void __launch_bounds__(32 * HEAD_WARPS) value_norms(float* y, const float* x, float eps, int n_heads) {
    const int lane = threadIdx.x % 32, head = blockIdx.y * HEAD_WARPS + threadIdx.x / 32;
    grid_dependency_wait();
    if (head >= n_heads) return;
    const size_t at = ((size_t)blockIdx.x * n_heads + head) * D + lane;
    float v[D / 32], squares = 0.f;
#pragma unroll
    for (int i = 0; i < D / 32; ++i) v[i] = x[at + 32 * i], squares = __fmaf_rn(v[i], v[i], squares);
    const float factor = __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(warp_sum(squares), (float)D), eps)));
#pragma unroll
    for (int i = 0; i < D / 32; ++i) y[at + 32 * i] = __fmul_rn(v[i], factor);
}
