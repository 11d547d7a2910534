// RMSNorm of each query and key head, in place, before RoPE.
//
//   q[t, h] = q[t, h] / sqrt(mean(q[t, h]²) + eps) · weight, and k alike
// Shapes: q [T, H·D], k [T, Hk·D] f32; q_weight, k_weight [D] f32, null for heads without a norm.
// Grid (T, ⌈(H + Hk) / HEAD_WARPS⌉), block 32·HEAD_WARPS: a warp a head, elements lane, lane + 32, …
// in registers. Alignment: 4 bytes. Bytes: 8 an element.
// Order and rounding: a lane's squares ascending by fused additions, then the warp's butterfly; as
// in the twin, the factor 1/sqrt is rounded twice, and each product once.
// Twin: `rms_norm` in worker/cpu/plain.py. Launcher: worker/gpu/head_norms.py.
#include "pdl.cuh"
#include "warp.cuh"

template <int D>
__global__ void __launch_bounds__(32 * HEAD_WARPS)
    head_norms(float* q, float* k, const float* q_weight, const float* k_weight, float q_eps, float k_eps, int n_heads,
               int n_kv_heads) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y * HEAD_WARPS + warp;
    const bool is_key = head >= n_heads, any = head < n_heads + n_kv_heads;
    const float* const weight = is_key ? k_weight : q_weight;
    float w[D / 32];
    if (any && weight) {  // constant during a step: read before the wait (pdl.cuh)
#pragma unroll
        for (int i = 0; i < D / 32; ++i) w[i] = weight[lane + 32 * i];
    }
    grid_dependency_wait();
    if (!any || !weight) return;
    float* const x = is_key ? k + ((size_t)blockIdx.x * n_kv_heads + head - n_heads) * D
                            : q + ((size_t)blockIdx.x * n_heads + head) * D;
    float v[D / 32], squares = 0.f;
#pragma unroll
    for (int i = 0; i < D / 32; ++i) v[i] = x[lane + 32 * i], squares = __fmaf_rn(v[i], v[i], squares);
    const float mean = __fdiv_rn(warp_sum(squares), (float)D);
    const float factor = __frcp_rn(__fsqrt_rn(__fadd_rn(mean, is_key ? k_eps : q_eps)));
#pragma unroll
    for (int i = 0; i < D / 32; ++i) x[lane + 32 * i] = __fmul_rn(__fmul_rn(v[i], factor), w[i]);
}
