// Dot products of rows of an expert's weights with several pairs' activations, each weight unpacked
// once: the grouped counterpart of vec_dot.cuh, with its bits.
//
// A lane holds two rows of the weights and takes every 16th unit: lane 2·l + b takes units l, l +
// 16, … of the rows of half b. vec_dot.cuh adds the units of lane u mod 32 in a chain and the 32
// chains by a butterfly. Here a lane walks chain l, then chain l + 16, whose sum is the butterfly's
// first step; the other steps are the same butterfly over l. Pairs' activations are Q8 blocks in
// shared memory; two lanes read the same 16 bytes.
//
// For the types with one scale and no minimum, `meta` holds the integer where the chain of dp4a
// starts: kMagic - zero·Σq. The sum's bits are then those of the f32 number 1.5·2^23 + Σ(code -
// zero)·q, because the sum is below 2^22. One fma multiplies it by the scale and subtracts
// scale·1.5·2^23, which is exact since a scale has at most 17 bits: rounded once, as vec_dot.cuh
// does. Only a zero's sign may differ, which no sum keeps.
#pragma once
#include "vec_dot.cuh"

constexpr int kTilePairs = TILE_PAIRS;
constexpr int kMagic = 0x4b400000;  // 1.5·2^23 in f32

template <class W>
constexpr bool kSimple = !Unit<W>::kHasMin && !Unit<W>::kTwoScales;

// A block's meta as staged for weights of type W.
template <class W>
__device__ __forceinline__ int2 staged_meta(int2 meta) {
    if (kSimple<W>) meta.y = kMagic - Unit<W>::kZero * ((short)meta.y + (meta.y >> 16));
    return meta;
}

// Pairs' activations in shared memory, a record for each unit: codes 0–15 of each pair, codes 16–31
// of each pair, padding; the metas likewise. Adjacent units are 17·16 and 9·8 bytes apart, so that
// lanes of adjacent units read different banks, and pairs are constant offsets.
struct PairRows {
    static constexpr int kRecord = 2 * kTilePairs + 1, kMetaRecord = kTilePairs + 1;
    uint4* q;    // [units][kRecord]
    int2* meta;  // [units][kMetaRecord]
    __device__ __forceinline__ PairRows(u8* shared, int units)
        : q(reinterpret_cast<uint4*>(shared)), meta(reinterpret_cast<int2*>(q + units * kRecord)) {}
};

// sums[t] + w·x[t] over unit u for T pairs.
template <class W, int T, int ROWS>
__device__ __forceinline__ void dot_pairs(const Unit<W> (&w)[ROWS], int u, const PairRows& x, float (&sums)[ROWS][T]) {
    const uint4* const record = x.q + u * PairRows::kRecord;
    const int2* const metas = x.meta + u * PairRows::kMetaRecord;
    Codes codes[ROWS];
    float scales[ROWS], offsets[ROWS];
    if constexpr (kSimple<W>) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            codes[r] = w[r].packed.unpack(), scales[r] = w[r].scales.unpack(u).scale[0];
            offsets[r] = -__fmul_rn(scales[r], __int_as_float(kMagic));
        }
    }
#pragma unroll
    for (int t = 0; t < T; ++t) {
        const uint4 a = record[t], b = record[kTilePairs + t];
        const int2 m = metas[t];
        ActivationUnit<W> v{{(int)a.x, (int)a.y, (int)a.z, (int)a.w, (int)b.x, (int)b.y, (int)b.z, (int)b.w},
                            __int_as_float(m.x),
                            {(short)m.y, m.y >> 16}};
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            if constexpr (kSimple<W>) {
                int sum = m.y;
#pragma unroll
                for (int i = 0; i < 8; ++i) sum = __dp4a(codes[r].w[i], v.q[i], sum);
                const float y = __fmaf_rn(scales[r], __int_as_float(sum), offsets[r]);
                sums[r][t] = __fmaf_rn(y, v.scale, sums[r][t]);
            } else {
                sums[r][t] = vec_dot(w[r], u, v, sums[r][t]);
            }
        }
    }
}

// The butterfly over the 16 lanes that share rows, of N sums a lane (a power of two up to 16): each
// step halves the number of sums that a lane keeps, while there are several. Returns the sum that
// this lane keeps, and adds its index to `index`; lanes with a bit of kCopies set hold copies.
template <int N, int MASK = 16>
__device__ __forceinline__ float butterfly(float (&v)[N], int& index) {
    const bool upper = threadIdx.x & MASK;
    if constexpr (N == 1) {
        v[0] = __fadd_rn(v[0], __shfl_xor_sync(0xffffffffu, v[0], MASK));
        if constexpr (MASK > 2) butterfly<1, MASK / 2>(v, index);
        return v[0];
    } else {
        float kept[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            const float keep = upper ? v[N / 2 + i] : v[i], send = upper ? v[i] : v[N / 2 + i];
            kept[i] = __fadd_rn(keep, __shfl_xor_sync(0xffffffffu, send, MASK));
        }
        if (upper) index += N / 2;
        if constexpr (MASK > 2) return butterfly<N / 2, MASK / 2>(kept, index);
        else return kept[0];
    }
}
template <int N>
constexpr int kCopies = 32 / N - 2;
