// Prefill: RoPE of q and k for a chunk of one sequence; q to f16 for tensor cores, k and v to the
// KV cache.
//
//   q'[t] = rope(q[t], start + t), K[start + t] = rope(k[t], start + t), V[start + t] = v[t] (f16)
// Inputs: q [T, H·D], k, v [T, Hk·D] f32; table [blocks] i32; span {start, T} i32 on the device;
// cos, sin [context, dims/2] f32. Outputs: rotated [T, H·D] f16; caches as in kv_cache.cuh. f16
// values are clamped to ±65504 (half.cuh).
// Grid (≥ T, blocks of a token), block 128; blocks of tokens from T on exit. Alignment: 4 bytes, 2
// for f16.
// Bytes: 6 a query element, 6 a KV element.
// Twin: `rotate` in worker/cpu/plain.py and `KvCache.write` in worker/cpu/attention.py with an f16
// cache.
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
    rope_kv(unsigned short* rotated, const float* q, const float* k, const float* v, unsigned short* k_cache,
            unsigned short* v_cache, const float* cos, const float* sin, int dims, const int* table, const int* span,
            int n_heads, int n_kv_heads) {
    const int t = blockIdx.x, position = span[0] + t;
    if (t >= span[1]) return;
    grid_dependency_wait();
    const int block = table[position / kKvBlock];
    const int first = blockIdx.y * blockDim.x + threadIdx.x, stride = gridDim.y * blockDim.x;
    const RopeTables rope = {cos, sin, dims};
    const size_t queries = (size_t)t * n_heads * D, kvs = (size_t)t * n_kv_heads * D;
    constexpr int kPairs = D / 2;
    for (int at = first; at < n_heads * kPairs; at += stride) {
        const RopePair<D, ADJACENT> pair(at % kPairs, dims);
        const size_t from = queries + at / kPairs * D;
        store(rotated + from, pair, pair.rotate(q + from, position, rope));
    }
    for (int at = first; at < n_kv_heads * kPairs; at += stride) {
        const RopePair<D, ADJACENT> pair(at % kPairs, dims);
        const size_t from = kvs + at / kPairs * D, to = kv_offset<D>(block, n_kv_heads, at / kPairs, position);
        store(k_cache + to, pair, pair.rotate(k + from, position, rope));
        store(v_cache + to, pair, make_float2(v[from + pair.first], v[from + pair.second]));
    }
}
