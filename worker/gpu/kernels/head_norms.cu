// RMSNorm of each query and key head, in place, and of each value head, into a copy, before RoPE.
//
// head_norm.cuh has the formula. Shapes: q [T, H·D], k, v and values [T, Hk·D] f32. v may be k: the
// values are then the keys before their norm. Nothing is written if values is v.
// Grid (T, ⌈(H + Hk) / HEAD_WARPS⌉), block 32·HEAD_WARPS: a warp a query head, or a key head and
// its value head. Alignment: 4 bytes. Bytes: 8 an element.
// Twin: `CpuOps.attention` in worker/cpu/ops.py. Launcher: worker/gpu/head_norms.py.
#include "head_norm.cuh"
#include "pdl.cuh"

template <int D>
__global__ void __launch_bounds__(32 * HEAD_WARPS)
    head_norms(float* q, float* k, const float* v, float* values, const HeadNorms norms, int n_heads, int n_kv_heads) {
    const int head = blockIdx.y * HEAD_WARPS + threadIdx.x / 32, kv_head = head - n_heads;
    const bool is_key = kv_head >= 0, any = kv_head < n_kv_heads;
    const HeadNorm norm = is_key ? norms.k : norms.q;
    WarpHead<D> x;
    if (any) x.load_weight(norm);  // before the wait (pdl.cuh)
    grid_dependency_wait();
    if (!any) return;
    const size_t kv = ((size_t)blockIdx.x * n_kv_heads + kv_head) * D;
    float* const in_place = is_key ? k + kv : q + ((size_t)blockIdx.x * n_heads + head) * D;
    x.load(in_place);
    if (is_key && values != v) {
        WarpHead<D> value;
        value.load_weight(norms.v);
        value.load(v + kv);
        value.normalize(norms.v);
        value.store(values + kv);
    }
    x.normalize(norm);
    x.store(in_place);
}
