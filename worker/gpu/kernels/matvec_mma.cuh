// One unit of 32 columns of a decode product on the tensor cores: 16 weight rows × 8·NT rows of
// activations, with the sums, roundings and order of `vec_dot` (vec_dot.cuh).
//
// The integer sums of a unit are exact in both, zero points included, so only the float expression
// that follows has to be the same. Differences that change no bit:
// - Zero points are subtracted from the codes.
// - scale·sum is one fma of the MMA's result kIntBias + sum, where scale·kIntBias is exact: scales
//   of at most 19 significant bits (an f16, or an f16 times an 8-bit integer).
// Shared memory, for each unit of 16 weight rows (rows of 16 bytes, `load_matrices` reads 8 without
// a conflict): codes, i8, [half of the unit][row / 8][row % 8][16]; then the row scales, see
// RowScales. Activations are read from global memory (q8_tiles.cuh).
#pragma once
#include "formats.cuh"
#include "mma_s8.cuh"
#include "q8_tiles.cuh"

template <class Block>
struct RowScales {  // floats of a weight row's unit, in the form that `multiply_unit` reads
    using W = Unit<Block>;
    static constexpr bool kFolds = !W::kHasMin && !kSame<Block, MXFP4>;  // an E8M0 scale·kIntBias can overflow
    static constexpr int kWords = W::kTwoScales ? 4 : 2;
    static constexpr int kSums = W::kHasMin ? (W::kTwoScales ? 2 : 1) : 0;  // sums of q that a unit of x needs
    float v[kWords];

    __device__ __forceinline__ RowScales() {}
    __device__ __forceinline__ explicit RowScales(const Scales& k) {
        if constexpr (W::kTwoScales) {
            v[0] = k.scale[0], v[1] = k.scale[1];
            v[2] = W::kHasMin ? k.min[0] : __fmul_rn(k.scale[1], -kIntBias), v[3] = k.min[1];
        } else {
            v[0] = k.scale[0];
            v[1] = W::kHasMin ? k.min[0] : __fmul_rn(k.scale[0], -kIntBias);
        }
    }
};

// Codes of a unit as signed bytes with the zero point subtracted. Codes with a zero point are below
// 64, so bytes do not carry.
template <class Block>
__device__ __forceinline__ Codes signed_codes(const Unit<Block>& w) {
    Codes c = w.packed.unpack();
    if constexpr (Unit<Block>::kZero != 0)
#pragma unroll
        for (int i = 0; i < 8; ++i) c.w[i] = (c.w[i] + 0x01010101 * (128 - Unit<Block>::kZero)) ^ 0x80808080;
    return c;
}

// Byte of a row of codes in a unit of 16 rows.
__device__ __forceinline__ int code_offset(int row, int half) { return half * 256 + row * 16; }
// Float of a row's scales: rows g and g + 8, which one lane needs, are one 16-byte load, or two.
template <class Block>
__device__ __forceinline__ int scale_offset(int row) {
    const int g = row % 8, upper = row / 8;
    return RowScales<Block>::kWords == 2 ? g * 4 + upper * 2 : upper * 32 + g * 4;
}

// Bytes of a unit of 16 rows in shared memory, with 16 that keep stores to adjacent units in
// different banks.
template <class Block>
constexpr int kUnitBytes = 512 + 64 * RowScales<Block>::kWords + 16;

// Convert and store the unit of one row; `index`: of the unit in its matrix. A unit that is not
// `valid` gets zero scales.
template <class Block>
__device__ __forceinline__ void store_unit(const Unit<Block>& w, u32 index, bool valid, int row, u8* unit) {
    const Codes c = signed_codes(w);
    *reinterpret_cast<uint4*>(unit + code_offset(row, 0)) = make_uint4(c.w[0], c.w[1], c.w[2], c.w[3]);
    *reinterpret_cast<uint4*>(unit + code_offset(row, 1)) = make_uint4(c.w[4], c.w[5], c.w[6], c.w[7]);
    const RowScales<Block> s(w.scales.unpack(index));
    float* const to = reinterpret_cast<float*>(unit + 512) + scale_offset<Block>(row);
    if constexpr (RowScales<Block>::kWords == 2)
        *reinterpret_cast<float2*>(to) = valid ? make_float2(s.v[0], s.v[1]) : make_float2(0.f, 0.f);
    else
        *reinterpret_cast<float4*>(to) =
            valid ? make_float4(s.v[0], s.v[1], s.v[2], s.v[3]) : make_float4(0.f, 0.f, 0.f, 0.f);
}

// The sum of a weight row and a token after one more unit. `c`: kIntBias + the integer sum of the
// unit, or of either half; sum: those of q. The expression of `vec_dot`.
template <class Block>
__device__ __forceinline__ float add_unit(const float (&c)[2], const RowScales<Block>& row, float x_scale,
                                          const float (&sum)[2], float acc) {
    using W = Unit<Block>;
    const float* const v = row.v;
    float y;
    if constexpr (W::kTwoScales) {
        const float b = W::kHasMin ? __fmul_rn(v[1], __fsub_rn(c[1], kIntBias)) : __fmaf_rn(v[1], c[1], v[2]);
        y = __fmaf_rn(v[0], __fsub_rn(c[0], kIntBias), b);
        if constexpr (W::kHasMin) y = __fsub_rn(y, __fmaf_rn(v[2], sum[0], __fmul_rn(v[3], sum[1])));
    } else if constexpr (W::kHasMin) {
        y = __fmaf_rn(v[0], __fsub_rn(c[0], kIntBias), -__fmul_rn(v[1], sum[0]));
    } else if constexpr (RowScales<Block>::kFolds) {
        y = __fmaf_rn(v[0], c[0], v[1]);
    } else {
        y = __fmul_rn(v[0], __fsub_rn(c[0], kIntBias));
    }
    return __fmaf_rn(y, x_scale, acc);
}

template <int N>
__device__ __forceinline__ void unpack4(const float4 from, float (&to)[N]) {
    to[0] = from.x, to[1] = from.y, to[2 % N] = from.z, to[3 % N] = from.w;
}

// Sums of a lane: acc[n][i] is that of weight row lane/4 + 8·(i/2) and of token 16·(n/2) + lane%4·4
// + n%2 + i%2·2.
template <int NT>
using Sums = float[NT][4];

// A unit of 16 weight rows in registers: the fragment of A, and the scales of the lane's two rows.
template <class Block>
struct RowFragment {
    u32 a[4];
    RowScales<Block> rows[2];
    __device__ __forceinline__ explicit RowFragment(const u8* unit) {
        load_matrices(a, unit + threadIdx.x % 32 * 16);
        const float* const from = reinterpret_cast<const float*>(unit + 512) + threadIdx.x % 32 / 4 * 4;
        if constexpr (RowScales<Block>::kWords == 2) {
            const float4 both = *reinterpret_cast<const float4*>(from);
            rows[0].v[0] = both.x, rows[0].v[1] = both.y, rows[1].v[0] = both.z, rows[1].v[1] = both.w;
        } else {
            unpack4(*reinterpret_cast<const float4*>(from), rows[0].v);
            unpack4(*reinterpret_cast<const float4*>(from + scale_offset<Block>(8)), rows[1].v);
        }
    }
};

// A unit of 16 tokens in registers: fragments of B, and scales and sums of the lane's four tokens.
template <class Block>
struct TokenFragment {
    static constexpr int kSums = RowScales<Block>::kSums;
    uint4 b;
    float x[1 + kSums][4];
    // `q`, `meta`: those of the unit and tile, from this lane's part on.
    __device__ __forceinline__ void load(const u8* q, const float* meta) {
        b = *reinterpret_cast<const uint4*>(q);
#pragma unroll
        for (int k = 0; k <= kSums; ++k) unpack4(*reinterpret_cast<const float4*>(meta + k * kTileRows), x[k]);
    }
};

// acc += weights·x for 16 rows and the 8 even or (ODD) odd tokens of a fragment.
template <class Block, bool ODD>
__device__ __forceinline__ void multiply_fragments(const RowFragment<Block>& w, const TokenFragment<Block>& t,
                                                   const int4& bias, float (&acc)[4]) {
    constexpr int kSums = RowScales<Block>::kSums;
    constexpr bool kTwo = Unit<Block>::kTwoScales;
    const u32 b0 = ODD ? t.b.z : t.b.x, b1 = ODD ? t.b.w : t.b.y;
    float c[2][4];
    if constexpr (kTwo) {
        mma_16x8x16_s8(c[0], w.a[0], w.a[1], b0, bias);
        mma_16x8x16_s8(c[1], w.a[2], w.a[3], b1, bias);
    } else {
        mma_16x8x32_s8(c[0], w.a, b0, b1, bias);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int token = ODD + i % 2 * 2;
        const float parts[2] = {c[0][i], kTwo ? c[1][i] : 0.f};
        const float sum = kSums > 0 ? t.x[kSums > 0][token] : 0.f, low = kSums > 1 ? t.x[kSums > 1 ? 2 : 0][token] : sum;
        const float sums[2] = {low, __fsub_rn(sum, low)};
        acc[i] = add_unit(parts, w.rows[i / 2], t.x[0][token], sums, acc[i]);
    }
}

// acc += weights·x over one unit, of NT/2 tiles of tokens.
template <class Block, int NT>
__device__ __forceinline__ void multiply_unit(const u8* weights, const u8* q, const float* meta, const int4& bias,
                                              Sums<NT>& acc) {
    const RowFragment<Block> w(weights);
#pragma unroll
    for (int n = 0; n < NT / 2; ++n) {
        TokenFragment<Block> t;
        t.load(q + n * 512, meta + n * kTileMeta);
        multiply_fragments<Block, false>(w, t, bias, acc[2 * n]);
        multiply_fragments<Block, true>(w, t, bias, acc[2 * n + 1]);
    }
}

template <int NT>
__device__ __forceinline__ void clear(Sums<NT>& acc) {
#pragma unroll
    for (int n = 0; n < NT; ++n) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.f;
}
