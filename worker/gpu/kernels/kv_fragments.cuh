// The keys and values of one head in one KV block, in a warp's registers, as operands of
// decode_heads.cuh's products.
//
// Scores: lane (g, c) = (lane/4, lane%4) holds elements of the keys g, g + 8, as 16 neighbouring
// bytes of the cache: with f16, elements 32i + 8c … 32i + 8c + 7, with codes, elements 64i + 16c …
// 64i + 16c + 15; of the last 32 codes of D = 96, 8 each.
// Sums: lane (g, c) holds elements 64i + 8g … 64i + 8g + 7 of the values at positions 2c, 2c + 1,
// 2c + 8, 2c + 9; of the last 32 elements of D = 96, 4 each.
// Users: decode_heads.cuh, and the kernels that include it.
#pragma once
#include "kv_cache.cuh"

template <int D, class Kv>
struct KvFragments;

template <int D>
struct KvFragments<D, F16Kv> {
    static constexpr int kSections = D / 32, kWide = D / 64;  // wide: 64 values, 16 bytes a lane
    static constexpr bool kNarrow = D % 64 != 0;
    // Registers hold keys or values of 256 elements: values are loaded where keys are not needed
    // any more.
    static constexpr bool kLateValues = D > 128;
    uint4 keys[2][kSections], values[4][kWide];
    uint2 narrow[4];

    // The first of the four elements of a head that a lane with this c has in step s of a score.
    __device__ __forceinline__ static int query_element(int s, int c) { return s / 2 * 32 + c * 8 + s % 2 * 4; }
    // The step that has elements e … e + 3, e a multiple of 4, and the lane's c.
    __device__ __forceinline__ static int step_of(int e) { return e / 32 * 2 + e % 8 / 4; }
    __device__ __forceinline__ static int column_of(int e) { return e % 32 / 8; }

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
    __device__ __forceinline__ void insert_newest(const F16Kv::Row<D>& key, const F16Kv::Row<D>& value, int start,
                                                  int newest) {
#pragma unroll
        for (int t = 0; t < 2; ++t)
            if (start + key_row(t) == newest) load_key(t, key.elements);
        if (kLateValues) return;
#pragma unroll
        for (int t = 0; t < 4; ++t)
            if (start + value_row(t) == newest) load_value(t, value.elements);
    }

    // Load elements 64i … 64i + 63 of the values at positions [oldest, newest], of which `value` is
    // the newest, and zero the others.
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

    // The keys of tile t as a fragment of B in step s of a score, and the score of a sum.
    __device__ __forceinline__ uint2 key(int t, int s) const {
        const uint4 k = keys[t][s / 2];
        return s % 2 ? make_uint2(k.z, k.w) : make_uint2(k.x, k.y);
    }
    __device__ __forceinline__ static float score(int, int, float sum) { return sum; }
    // The values of tile j as a fragment of B, and the factor of a value whose position has this
    // weight.
    __device__ __forceinline__ uint2 value(int j) const {
        unsigned int row[4];
#pragma unroll
        for (int t = 0; t < 4; ++t) row[t] = word(t, j);
        const unsigned int half = j % 2 ? 0x7632 : 0x5410;
        return make_uint2(__byte_perm(row[0], row[1], half), __byte_perm(row[2], row[3], half));
    }
    __device__ __forceinline__ static float factor(int, int, float weight) { return weight; }

private:
    // The 32-bit word that holds the lane's element of tile j in its value row t.
    __device__ __forceinline__ unsigned int word(int t, int j) const {
        if (j >= 8 * kWide) return j % 4 / 2 ? narrow[t].y : narrow[t].x;
        const uint4 v = values[t][j / 8];
        const int w = j % 8 / 2;
        return w == 0 ? v.x : w == 1 ? v.y : w == 2 ? v.z : v.w;
    }

    template <bool PAST_L1, class Words>
    __device__ __forceinline__ static Words words(const unsigned short* from) {
        const Words* const at = reinterpret_cast<const Words*>(from);
        return PAST_L1 ? __ldcg(at) : *at;
    }
};

// The same with codes: 16 keys or 8 values a load. Products are those of (code - 128)/64; the scale
// of a key is a factor of its score, that of a value a factor of its weight.
template <int D>
struct KvFragments<D, Q8Kv> {
    static constexpr int kWide = D / 64;  // sections of 64 elements
    static constexpr bool kNarrow = D % 64 != 0, kLateValues = false;
    uint4 keys[2][kWide];
    uint2 narrow_keys[2], values[4][kWide];
    unsigned int narrow_values[4];
    uint2 key_scales, value_scales;  // of the lane's four positions: pairs of f16

    __device__ __forceinline__ static int query_element(int s, int c) {
        return s < 4 * kWide ? s / 4 * 64 + 16 * c + s % 4 * 4 : 64 * kWide + 8 * c + s % 2 * 4;
    }
    __device__ __forceinline__ static int step_of(int e) {
        return e < 64 * kWide ? e / 64 * 4 + e % 16 / 4 : 4 * kWide + e % 8 / 4;
    }
    __device__ __forceinline__ static int column_of(int e) { return e < 64 * kWide ? e % 64 / 16 : e % 32 / 8; }

    __device__ __forceinline__ static int key_row(int t) { return 8 * t + threadIdx.x % 32 / 4; }
    __device__ __forceinline__ static int value_row(int t) { return t / 2 * 8 + 2 * (threadIdx.x % 4) + t % 2; }

    __device__ __forceinline__ void load_key(int t, const unsigned char* row) {
        const int c = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < kWide; ++i) keys[t][i] = *reinterpret_cast<const uint4*>(row + 64 * i + 16 * c);
        if (kNarrow) narrow_keys[t] = *reinterpret_cast<const uint2*>(row + 64 * kWide + 8 * c);
    }
    __device__ __forceinline__ void load_value(int t, const unsigned char* row) {
        const int g = threadIdx.x % 32 / 4;
#pragma unroll
        for (int i = 0; i < kWide; ++i) values[t][i] = *reinterpret_cast<const uint2*>(row + 64 * i + 8 * g);
        if (kNarrow) narrow_values[t] = *reinterpret_cast<const unsigned int*>(row + 64 * kWide + 4 * g);
    }

    // Load the rows at positions [oldest, newest) of two head blocks, in device or shared memory.
    // Others have a scale of zero: that of an unwritten slot may be NaN, but codes are finite.
    __device__ __forceinline__ void load(const unsigned char* key_block, const unsigned char* value_block, int start,
                                         int oldest, int newest) {
        const int c = threadIdx.x % 4, from = max(oldest - start, 0), to = newest - start;
        key_scales = reinterpret_cast<const uint2*>(key_block + kKvBlock * D)[c];
        value_scales = reinterpret_cast<const uint2*>(value_block + kKvBlock * D)[c];
#pragma unroll
        for (int t = 0; t < 2; ++t) load_key(t, key_block + key_row(t) * D);
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            load_value(t, value_block + value_row(t) * D);
            if (value_row(t) < from || value_row(t) >= to) set_scale(value_scales, t, 0);
        }
    }

    // Insert the newest position's key and value, which this launch computes.
    __device__ __forceinline__ void insert_newest(const Q8Kv::Row<D>& key, const Q8Kv::Row<D>& value, int start,
                                                  int newest) {
#pragma unroll
        for (int t = 0; t < 2; ++t)
            if (start + key_row(t) == newest) load_key(t, key.elements);
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            if (start + value_row(t) != newest) continue;
            load_value(t, value.elements);
            set_scale(key_scales, t, key.scale), set_scale(value_scales, t, value.scale);
        }
    }

    __device__ __forceinline__ uint2 key(int t, int s) const {
        if (s >= 4 * kWide) return Q8Kv::halves(s % 2 ? narrow_keys[t].y : narrow_keys[t].x);
        const uint4 k = keys[t][s / 4];
        return Q8Kv::halves(s % 4 == 0 ? k.x : s % 4 == 1 ? k.y : s % 4 == 2 ? k.z : k.w);
    }
    __device__ __forceinline__ float score(int t, int e, float sum) const {
        return __fmul_rn(scale_of(key_scales, t, e), sum);
    }
    __device__ __forceinline__ uint2 value(int j) const { return make_uint2(pairs(0, j), pairs(2, j)); }
    __device__ __forceinline__ float factor(int t, int e, float weight) const {
        return __fmul_rn(scale_of(value_scales, t, e), weight);
    }

private:
    __device__ __forceinline__ static float scale_of(const uint2 scales, int t, int e) {
        const float2 pair = half2_to_float2(t ? scales.y : scales.x);
        return e ? pair.y : pair.x;
    }
    // Replace the scale of value row t.
    __device__ __forceinline__ static void set_scale(uint2& scales, int t, unsigned short scale) {
        unsigned int& pair = t / 2 ? scales.y : scales.x;
        pair = __byte_perm(pair, scale, t % 2 ? 0x5410 : 0x3254);
    }
    // The lane's elements of tile j in the value rows t and t + 1.
    __device__ __forceinline__ unsigned int pairs(int t, int j) const {
        const unsigned int both = __byte_perm(word(t, j), word(t + 1, j), j % 4 < 2 ? 0x5140 : 0x7362);
        const uint2 halves = Q8Kv::halves(both);
        return j % 2 ? halves.y : halves.x;
    }
    __device__ __forceinline__ unsigned int word(int t, int j) const {
        if (j >= 8 * kWide) return narrow_values[t];
        return j % 8 / 4 ? values[t][j / 8].y : values[t][j / 8].x;
    }
};
