// Prompt tokens of one sequence: RoPE of q and k, q as f16 for the tensor cores, k and v to the KV blocks.
//
// q [T, H·D], k, v [T, Hk·D] f32; turned [T, H·D] f16; caches as in kv_cache.cuh; table i32 of this sequence; place:
// {start, T} on the device; token t is at position start + t. Grid x of at least T, y over parts of a token's elements,
// 128 threads. f16 clamps to ±65504 (half.cuh). Bytes: 6 a query element, 6 a KV element.
// Twin: `rotate` in worker/cpu/plain.py and `KvCache.write` in worker/cpu/kv_cache.py with an f16 cache.
#include "pdl.cuh"
#include "half.cuh"
#include "kv_cache.cuh"
#include "rope.cuh"

template <int D, bool ADJACENT>
__device__ __forceinline__ void store(unsigned short* head, const RopePair<D, ADJACENT> pair, const float2 v) {
    head[pair.first] = float_to_half(clamp_to_half_range(v.x));
    head[pair.second] = float_to_half(clamp_to_half_range(v.y));
}

template <int D, bool ADJACENT>
__global__ void __launch_bounds__(128)
    rope_kv(unsigned short* turned, const float* q, const float* k, const float* v, unsigned short* k_cache,
            unsigned short* v_cache, const float* cos, const float* sin, int dims, const int* table, const int* place,
            int n_heads, int n_kv_heads) {
    const int t = blockIdx.x, position = place[0] + t;
    if (t >= place[1]) return;
    grid_dependency_wait();
    const int block = table[position / kKvBlock];
    const int first = blockIdx.y * blockDim.x + threadIdx.x, stride = gridDim.y * blockDim.x;
    const RopeTables rope = {cos, sin, dims};
    const size_t queries = (size_t)t * n_heads * D, kvs = (size_t)t * n_kv_heads * D;
    constexpr int kPairs = D / 2;
    for (int at = first; at < n_heads * kPairs; at += stride) {
        const RopePair<D, ADJACENT> pair(at % kPairs, dims);
        const size_t from = queries + at / kPairs * D;
        store(turned + from, pair, pair.rotated(q + from, position, rope));
    }
    for (int at = first; at < n_kv_heads * kPairs; at += stride) {
        const RopePair<D, ADJACENT> pair(at % kPairs, dims);
        const size_t from = kvs + at / kPairs * D, to = kv_offset<D>(block, n_kv_heads, at / kPairs, position);
        store(k_cache + to, pair, pair.rotated(k + from, position, rope));
        store(v_cache + to, pair, make_float2(v[from + pair.first], v[from + pair.second]));
    }
}
