// Attention of up to eight query heads of one token to one KV block, on tensor cores, in one warp.
//
// Both products are m16n8k16 (mma.cuh) with the heads as rows 0–7 of A. Rows 8–15 hold the rounding
// errors of the f16 values in rows 0–7: queries and weights have 22 significant bits, and products
// with the cache's elements are as precise as in f32. The order of a product's inner elements is
// free, so lanes load keys as they lie in the cache (kv_fragments.cuh); it is the same in all
// users:
//   scores: lane (g, c) = (lane/4, lane%4) holds some elements of keys g, g + 8
//   sums:   the inner elements are the positions 0 … 15 in order
// The columns of the sums are independent of each other.
// The softmax is online and in base 2: each lane keeps the peak of its head g and the total of its
// own positions. Users: attention_decode.cu, attention_few_rows.cu, attention_rows.cu.
#pragma once
#include "half.cuh"
#include "kv_fragments.cuh"
#include "mma.cuh"
#include "softmax_parts.cuh"

// a and b as pairs of f16: the rounded values, and the rounding errors.
__device__ __forceinline__ void split_pair(float a, float b, unsigned int& high, unsigned int& low) {
    high = floats_to_half2(a, b);
    const float2 rounded = half2_to_float2(high);
    low = floats_to_half2(__fsub_rn(a, rounded.x), __fsub_rn(b, rounded.y));
}

template <int D, class Kv>
struct Heads {
    using Fragments = KvFragments<D, Kv>;
    static constexpr int kTiles = D / 8, kWide = Fragments::kWide;
    static constexpr bool kNarrow = Fragments::kNarrow;
    static constexpr int kSteps = D / 16;  // steps of a score's inner product, 16 elements each
    float sums[kTiles][4], peak, total;

    // The first of the four elements of head g that lane (g, c) holds in step s of a score.
    __device__ __forceinline__ static int query_element(int s, int lane) {
        return Fragments::query_element(s, lane % 4);
    }

    // Those four elements as a fragment of A; `attend` reads [kSteps][32] of them from shared
    // memory.
    __device__ __forceinline__ static uint4 query(const float4 v) {
        uint4 a;
        split_pair(v.x, v.y, a.x, a.y);
        split_pair(v.z, v.w, a.z, a.w);
        return a;
    }

    __device__ __forceinline__ void reset() {
        peak = -kInfinity, total = 0.f;
#pragma unroll
        for (int j = 0; j < kTiles; ++j) sums[j][0] = sums[j][1] = sums[j][2] = sums[j][3] = 0.f;
    }

    // Replace peak and total by those that include the positions of one KV block, of which at least
    // one is visible. Returns the factor of the sums before it, and the positions' weights as a
    // fragment of A. Keys: `key` and the factors of KvFragments; query_at(s): the lane's fragment
    // of step s.
    template <class Keys, class QueryAt>
    __device__ __forceinline__ float weigh(const Keys& kv, QueryAt query_at, int start, int oldest, int newest,
                                           unsigned int (&a)[4]) {
        const int c = threadIdx.x % 4;
        float weights[2][2], scores[2][4] = {}, highest = peak;
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            const uint4 v = query_at(s);
            const unsigned int query[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                const uint2 k = kv.key(t, s);
                mma_16x8x16(scores[t], query, k.x, k.y);
            }
        }
#pragma unroll
        for (int t = 0; t < 2; ++t) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int p = start + 8 * t + 2 * c + e;
                weights[t][e] = p >= oldest && p <= newest ? kv.score(t, e, scores[t][e] + scores[t][e + 2]) : -kInfinity;
                highest = fmaxf(highest, weights[t][e]);
            }
        }
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
        const float scale = exp2f(__fsub_rn(peak, highest));
        peak = highest;
#pragma unroll
        for (int t = 0; t < 2; ++t) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float weight = weights[t][e] = exp2f(__fsub_rn(weights[t][e], peak));
                total = t + e == 0 ? fmaf(total, scale, weight) : __fadd_rn(total, weight);
            }
        }
#pragma unroll
        for (int t = 0; t < 2; ++t)
            split_pair(kv.factor(t, 0, weights[t][0]), kv.factor(t, 1, weights[t][1]), a[2 * t], a[2 * t + 1]);
        return scale;
    }

    struct Nothing {
        __device__ __forceinline__ void operator()(int) const {}
    };
    // Add the positions of one KV block, of which at least one is visible. load_values(i) is called
    // before elements from 64i on of the values are read.
    template <class LoadValues = Nothing>
    __device__ __forceinline__ void attend(const Fragments& kv, const uint4 (*queries)[32], int start, int oldest,
                                           int newest, LoadValues load_values = {}) {
        attend_to(kv, [=](int s) { return queries[s][threadIdx.x % 32]; }, start, oldest, newest, load_values);
    }
    template <class QueryAt, class LoadValues = Nothing>
    __device__ __forceinline__ void attend_to(const Fragments& kv, QueryAt query_at, int start, int oldest, int newest,
                                              LoadValues load_values = {}) {
        unsigned int a[4];
        const float scale = weigh(kv, query_at, start, oldest, newest, a);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
            if (j % 8 == 0) load_values(j / 8);
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[j][e] = __fmul_rn(sums[j][e], scale);
            const uint2 v = kv.value(j);
            mma_16x8x16(sums[j], a, v.x, v.y);
        }
    }

    // Store the partial result of `count` heads, ROW floats from head to head (softmax_parts.cuh:
    // D).
    template <int ROW = D>
    __device__ __forceinline__ void store_partial(float* partial, int count) {
        const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
        total = __fadd_rn(total, __shfl_xor_sync(0xffffffffu, total, 1));
        total = __fadd_rn(total, __shfl_xor_sync(0xffffffffu, total, 2));
        if (g >= count) return;
        const auto four = [&](int e, int j) {
            return make_float4(
                __fadd_rn(sums[j][e], sums[j][e + 2]), __fadd_rn(sums[j + 1][e], sums[j + 1][e + 2]),
                __fadd_rn(sums[j + 2][e], sums[j + 2][e + 2]), __fadd_rn(sums[j + 3][e], sums[j + 3][e + 2]));
        };
        float4* const quads = reinterpret_cast<float4*>(partial + g * ROW);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int of = 2 * c + e;
#pragma unroll
            for (int i = 0; i < kWide; ++i) {
                quads[16 * i + 2 * of] = four(e, 8 * i);
                quads[16 * i + 2 * of + 1] = four(e, 8 * i + 4);
            }
            if (kNarrow) quads[16 * kWide + of] = four(e, 8 * kWide);
        }
        if (c == 0) partial[count * ROW + 2 * g] = peak, partial[count * ROW + 2 * g + 1] = total;
    }
};
