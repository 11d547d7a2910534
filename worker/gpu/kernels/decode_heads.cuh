// Attention of up to eight query heads of one token to one KV block, on tensor cores, in one warp.
//
// Both products are m16n8k16 (mma.cuh) with the heads as rows 0–7 of A. Rows 8–15 hold the rounding
// errors of the f16 values in rows 0–7: queries and weights have 22 significant bits, and products
// with the f16 cache are as precise as in f32. The order of a product's inner elements is free, so
// each lane loads keys as 16 neighbouring bytes of the cache; it is the same in all users:
//   scores: lane (g, c) = (lane/4, lane%4) holds elements 32i + 8c … 32i + 8c + 7 of keys g, g + 8
//   sums:   the inner elements are the positions 0 … 15 in order
// The columns of the sums are independent of each other. `attend` takes them from 16 neighbouring
// bytes of a value: lane (g, c) holds elements 64i + 8g … 64i + 8g + 7 of the values at positions 2c,
// 2c + 1, 2c + 8, 2c + 9; of the last 32 elements of D = 96, 4 each.
// The softmax is online and in base 2: each lane keeps the peak of its head g and the total of its
// own positions. Users: attention_decode.cu, attention_few_rows.cu, attention_rows.cu.
#pragma once
#include "half.cuh"
#include "kv_cache.cuh"
#include "mma.cuh"
#include "softmax_parts.cuh"

// a and b as pairs of f16: the rounded values, and the rounding errors.
__device__ __forceinline__ void split_pair(float a, float b, unsigned int& high, unsigned int& low) {
    high = floats_to_half2(a, b);
    const float2 rounded = half2_to_float2(high);
    low = floats_to_half2(__fsub_rn(a, rounded.x), __fsub_rn(b, rounded.y));
}

template <int D>
struct KvFragments {  // keys and values of one head in one KV block, in a warp's registers
    static constexpr int kSections = D / 32, kWide = D / 64;  // wide: 64 values, 16 bytes a lane
    static constexpr bool kNarrow = D % 64 != 0;
    // Registers hold keys or values of 256 elements: values are loaded where keys are not needed any more.
    static constexpr bool kLateValues = D > 128;
    uint4 keys[2][kSections], values[4][kWide];
    uint2 narrow[4];

    __device__ __forceinline__ static int key_row(int t) { return 8 * t + threadIdx.x % 32 / 4; }
    __device__ __forceinline__ static int value_row(int t) { return t / 2 * 8 + 2 * (threadIdx.x % 4) + t % 2; }

    template <bool PAST_L1 = false>
    __device__ __forceinline__ void load_key(int t, const unsigned short* row) {
        const int c = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < kSections; ++i) keys[t][i] = words<PAST_L1, uint4>(row + 32 * i + 8 * c);
    }
    template <bool PAST_L1 = false>
    __device__ __forceinline__ void load_value(int t, const unsigned short* row) {
        const int g = threadIdx.x % 32 / 4;
#pragma unroll
        for (int i = 0; i < kWide; ++i) values[t][i] = words<PAST_L1, uint4>(row + 64 * i + 8 * g);
        if (kNarrow) narrow[t] = words<PAST_L1, uint2>(row + 64 * kWide + 4 * g);
    }

    // Load the rows at positions [oldest, newest); zero the others: an unwritten slot may hold NaN,
    // and 0·NaN is NaN. PAST_L1: through L2, if an earlier kernel of this graph has written some.
    template <bool PAST_L1 = false>
    __device__ __forceinline__ void load(const unsigned short* key_block, const unsigned short* value_block, int start,
                                         int oldest, int newest) {
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            const int p = start + key_row(t);
#pragma unroll
            for (int i = 0; i < kSections; ++i) keys[t][i] = make_uint4(0, 0, 0, 0);
            if (p >= oldest && p < newest) load_key<PAST_L1>(t, key_block + key_row(t) * D);
        }
        if (kLateValues) return;
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            const int p = start + value_row(t);
#pragma unroll
            for (int i = 0; i < kWide; ++i) values[t][i] = make_uint4(0, 0, 0, 0);
            narrow[t] = make_uint2(0, 0);
            if (p >= oldest && p < newest) load_value<PAST_L1>(t, value_block + value_row(t) * D);
        }
    }

    // Insert the newest position's key and value, which this launch computes.
    __device__ __forceinline__ void insert_newest(const unsigned short* key, const unsigned short* value, int start,
                                                  int newest) {
#pragma unroll
        for (int t = 0; t < 2; ++t)
            if (start + key_row(t) == newest) load_key(t, key);
        if (kLateValues) return;
#pragma unroll
        for (int t = 0; t < 4; ++t)
            if (start + value_row(t) == newest) load_value(t, value);
    }

    // Load elements 64i … 64i + 63 of the values at positions [oldest, newest], of which `value` is the
    // newest, and zero the others.
    __device__ __forceinline__ void load_late_values(int i, const unsigned short* value_block,
                                                     const unsigned short* value, int start, int oldest, int newest) {
        const int g = threadIdx.x % 32 / 4;
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            const int p = start + value_row(t);
            values[t][i] = make_uint4(0, 0, 0, 0);
            if (p >= oldest && p <= newest)
                values[t][i] = words<false, uint4>((p == newest ? value : value_block + value_row(t) * D) + 64 * i + 8 * g);
        }
    }

    // The 32-bit word that holds the lane's element of tile j in its value row t.
    __device__ __forceinline__ unsigned int word(int t, int j) const {
        if (j >= 8 * kWide) return j % 4 / 2 ? narrow[t].y : narrow[t].x;
        const uint4 v = values[t][j / 8];
        const int w = j % 8 / 2;
        return w == 0 ? v.x : w == 1 ? v.y : w == 2 ? v.z : v.w;
    }

private:
    template <bool PAST_L1, class Words>
    __device__ __forceinline__ static Words words(const unsigned short* from) {
        const Words* const at = reinterpret_cast<const Words*>(from);
        return PAST_L1 ? __ldcg(at) : *at;
    }
};

template <int D>
struct Heads {
    static constexpr int kTiles = D / 8, kWide = KvFragments<D>::kWide;
    static constexpr bool kNarrow = KvFragments<D>::kNarrow;
    static constexpr int kSteps = D / 16;  // steps of a score's inner product, 16 elements each
    float sums[kTiles][4], peak, total;

    // The first of the four elements of head g that lane (g, c) holds in step s of a score.
    __device__ __forceinline__ static int query_element(int s, int lane) {
        return s / 2 * 32 + lane % 4 * 8 + s % 2 * 4;
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
    // fragment of A. Keys: `keys` as in KvFragments; query_at(s): the lane's fragment of step s.
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
                const uint4 k = kv.keys[t][s / 2];
                mma_16x8x16(scores[t], query, s % 2 ? k.z : k.x, s % 2 ? k.w : k.y);
            }
        }
#pragma unroll
        for (int t = 0; t < 2; ++t) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int p = start + 8 * t + 2 * c + e;
                weights[t][e] = p >= oldest && p <= newest ? scores[t][e] + scores[t][e + 2] : -kInfinity;
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
        split_pair(weights[0][0], weights[0][1], a[0], a[1]);
        split_pair(weights[1][0], weights[1][1], a[2], a[3]);
        return scale;
    }

    struct Nothing {
        __device__ __forceinline__ void operator()(int) const {}
    };
    // Add the positions of one KV block, of which at least one is visible. load_values(i) is called
    // before elements from 64i on of the values are read.
    template <class LoadValues = Nothing>
    __device__ __forceinline__ void attend(const KvFragments<D>& kv, const uint4 (*queries)[32], int start, int oldest,
                                           int newest, LoadValues load_values = {}) {
        unsigned int a[4];
        const float scale =
            weigh(kv, [=](int s) { return queries[s][threadIdx.x % 32]; }, start, oldest, newest, a);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
            if (j % 8 == 0) load_values(j / 8);
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[j][e] = __fmul_rn(sums[j][e], scale);
            unsigned int row[4];
#pragma unroll
            for (int t = 0; t < 4; ++t) row[t] = kv.word(t, j);
            const unsigned int half = j % 2 ? 0x7632 : 0x5410;
            mma_16x8x16(sums[j], a, __byte_perm(row[0], row[1], half), __byte_perm(row[2], row[3], half));
        }
    }

    // Store the partial result of `count` heads, ROW floats from head to head (softmax_parts.cuh: D).
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
