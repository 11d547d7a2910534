// Prefill: RoPE of q and k of a batch of chunks; q to f16 for tensor cores, k and v to the KV
// cache.
//
//   q'[t] = rope(q[t], p), K[p] = rope(k[t], p), V[p] = v[t], with p the position of row t
// With NORMS (HeadNorms) the heads of q, k and v are normalized first (head_norm.cuh); v may be k.
// Inputs: q [T, H·D], k, v [T, Hk·D] f32; batch (prefill_batch.cuh); cos, sin [context, dims/2]
// f32.
// Outputs: rotated [T, H·D] f16; caches as in kv_cache.cuh. f16 values are clamped to ±65504
// (half.cuh). Q8Kv needs NORMS, whose parts may be absent.
// Grid (T, blocks of a row), block 128; blocks of rows without a token exit. With norms a row has a
// warp for each query head, and for each key head with its value. Alignment: 4 bytes, 2 for f16.
// Bytes: 6 a query element, 6 a KV element.
// Twin: `rotate` in worker/cpu/plain.py and `KvCache.write` in worker/cpu/kv_cache.py.
#include "pdl.cuh"
#include "half.cuh"
#include "head_norm.cuh"
#include "kv_cache.cuh"
#include "prefill_batch.cuh"
#include "rope.cuh"

constexpr int kThreads = 128;

template <int D, bool ADJACENT>
__device__ __forceinline__ void store(unsigned short* head, const RopePair<D, ADJACENT> pair, const float2 v) {
    head[pair.first] = float_to_half(clamp_to_half_range(v.x));
    head[pair.second] = float_to_half(clamp_to_half_range(v.y));
}

// What a warp computes with norms: a query head, or a key head and its value.
template <int D, class Kv>
struct NormedHead {
    const float *from, *value;  // value: null for a query head
    void *to, *value_to;        // rows; with Q8Kv those of a key and a value are head blocks

    template <bool ADJACENT>
    __device__ __forceinline__ void write(int position, const RopeTables rope, const HeadNorms& norms) const {
        __shared__ float normed[kThreads / 32][D];
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const HeadNorm norm = value ? norms.k : norms.q;
        WarpHead<D> x;
        x.load_weight(norm);
        x.load(from);
        x.normalize(norm);
        x.store(normed[warp]);
        __syncwarp();
        const bool quantized = Kv::kQuantized && value;
        if (quantized) {
            WarpRotation<D, ADJACENT> rotation;
            rotation.load(position, rope);
            rotation.rotate_head(x.x, normed[warp]);
            Q8Row<D>(x.x).store(static_cast<unsigned char*>(to), position);
        } else {
#pragma unroll
            for (int i = lane; i < D / 2; i += 32) {
                const RopePair<D, ADJACENT> pair(i, rope.dims);
                store(static_cast<unsigned short*>(to), pair, pair.rotate(normed[warp], position, rope));
            }
        }
        if (!value) return;
        x.load_weight(norms.v);
        x.load(value);
        x.normalize(norms.v);
        if (quantized) {
            Q8Row<D>(x.x).store(static_cast<unsigned char*>(value_to), position);
        } else {
#pragma unroll
            for (int i = 0; i < D / 32; ++i)
                static_cast<unsigned short*>(value_to)[lane + 32 * i] = float_to_half(clamp_to_half_range(x.x[i]));
        }
    }
};

template <int D, bool ADJACENT, class Kv, class... Norms>
__global__ void __launch_bounds__(kThreads)
    rope_kv(unsigned short* rotated, const float* q, const float* k, const float* v, typename Kv::Element* k_cache,
            typename Kv::Element* v_cache, const float* cos, const float* sin, int dims, const PrefillBatch batch,
            int n_heads, int n_kv_heads, Norms... norms) {
    const int t = blockIdx.x;
    const PrefillRow row = batch.rows[t];
    const int position = row.position;
    if (position < 0) return;
    grid_dependency_wait();
    const int block = batch.tables[row.table + position / kKvBlock];
    const int first = blockIdx.y * blockDim.x + threadIdx.x, stride = gridDim.y * blockDim.x;
    const RopeTables rope = {cos, sin, dims};
    const size_t queries = (size_t)t * n_heads * D, kvs = (size_t)t * n_kv_heads * D;
    if constexpr (sizeof...(Norms) > 0) {
        const int head = first / 32, kv_head = head - n_heads;
        if (kv_head >= n_kv_heads) return;
        const size_t query = queries + head * D, kv = kvs + kv_head * D;
        NormedHead<D, Kv> normed = {q + query, nullptr, rotated + query, nullptr};
        if (kv_head >= 0) {
            const size_t to = Kv::template row<D>(block, n_kv_heads, kv_head, Kv::kQuantized ? 0 : position);
            normed = {k + kv, v + kv, k_cache + to, v_cache + to};
        }
        normed.template write<ADJACENT>(position, rope, norms...);
    } else {
        constexpr int kPairs = D / 2;
        for (int at = first; at < n_heads * kPairs; at += stride) {
            const RopePair<D, ADJACENT> pair(at % kPairs, dims);
            const size_t from = queries + at / kPairs * D;
            store(rotated + from, pair, pair.rotate(q + from, position, rope));
        }
        for (int at = first; at < n_kv_heads * kPairs; at += stride) {
            const RopePair<D, ADJACENT> pair(at % kPairs, dims);
            const size_t from = kvs + at / kPairs * D, to = Kv::template row<D>(block, n_kv_heads, at / kPairs, position);
            store(k_cache + to, pair, pair.rotate(k + from, position, rope));
            store(v_cache + to, pair, make_float2(v[from + pair.first], v[from + pair.second]));
        }
    }
}
