// One unit of 32 columns of a decode product on the tensor cores: 16 weight rows × 8·NT rows of
// activations, with the sums, roundings and order of `vec_dot` (vec_dot.cuh).
//
// The integer sums of a unit are exact in both, zero points included, so only the float expression
// that follows has to be the same. Differences that change no bit:
// - Zero points are subtracted from the codes.
// - scale·sum is one fma of the MMA's result kIntBias + sum, where scale·kIntBias is exact: scales
//   of at most 19 significant bits (an f16, or an f16 times an 8-bit integer).
// - A lane without a unit adds nothing instead of +0: see `close_split` of matvec_mma.cu.
// Shared memory, for each unit (rows of 16 bytes, `load_matrices` reads 8 without a conflict):
// - codes, i8: [half of the unit][row/8 % 2][row % 8][16], for each 16 weight rows;
// - q, i8: [token/16][token/2 % 2][half][n][16], n = token%16/4·2 + token%2, which gives a lane four
//   adjacent tokens in two MMAs;
// - row scales: see RowScales; meta, f32: [scale, sums][token].
#pragma once
#include "formats.cuh"
#include "mma_s8.cuh"
#include "q8_activations.cuh"

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

// Byte of a row of codes (row, half) in the codes of a unit, and of (token, half) in its q.
__device__ __forceinline__ int code_offset(int row, int half) {
    return row / 16 * 512 + half * 256 + row / 8 % 2 * 128 + row % 8 * 16;
}
__device__ __forceinline__ int q_offset(int token, int half) {
    return token / 16 * 512 + token / 2 % 2 * 256 + half * 128 + (token % 16 / 4 * 2 + token % 2) * 16;
}
// Float of a row's scales in the scales of a unit: rows g and g + 8, which one lane needs, are one
// 16-byte load, or two.
template <class Block>
__device__ __forceinline__ int scale_offset(int row) {
    constexpr int kWords = RowScales<Block>::kWords;
    const int fragment = row / 16, g = row % 8, upper = row / 8 % 2;
    return kWords == 2 ? fragment * 32 + g * 4 + upper * 2 : fragment * 64 + upper * 32 + g * 4;
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

// Sums of a lane: acc[m][n][i] is that of weight row 16·m + lane/4 + 8·(i/2) and token 16·(n/2) +
// lane%4·4 + n%2·2 + i%2.
template <int FRAGS_M, int NT>
using Sums = float[FRAGS_M][NT][4];

// A unit of 16 weight rows in registers: the fragment of A, and the scales of the lane's two rows.
template <class Block>
struct RowFragment {
    u32 a[4];
    RowScales<Block> rows[2];
    __device__ __forceinline__ void load(const u8* codes, const float* scales) {
        load_matrices(a, codes + threadIdx.x % 32 * 16);
        const float* const from = scales + threadIdx.x % 32 / 4 * 4;
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
    u32 b[4];
    float x[1 + kSums][4];
    __device__ __forceinline__ void load(const u8* q, const float* meta, int meta_stride) {
        load_matrices(b, q + threadIdx.x % 32 * 16);
#pragma unroll
        for (int k = 0; k <= kSums; ++k)
            unpack4(*reinterpret_cast<const float4*>(meta + k * meta_stride + threadIdx.x % 4 * 4), x[k]);
    }
};

// acc += weights·x for 16 rows and 8 tokens, the first of a fragment or, with `half` 1, the others.
template <class Block>
__device__ __forceinline__ void multiply_fragments(const RowFragment<Block>& w, const TokenFragment<Block>& t, int half,
                                                   float (&acc)[4]) {
    constexpr int kSums = RowScales<Block>::kSums;
    constexpr bool kTwo = Unit<Block>::kTwoScales;
    float c[2][4];
    if constexpr (kTwo) {
        mma_16x8x16_s8(c[0], w.a[0], w.a[1], t.b[2 * half]);
        mma_16x8x16_s8(c[1], w.a[2], w.a[3], t.b[2 * half + 1]);
    } else {
        mma_16x8x32_s8(c[0], w.a, t.b[2 * half], t.b[2 * half + 1]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int token = 2 * half + i % 2;
        const float parts[2] = {c[0][i], kTwo ? c[1][i] : 0.f};
        const float sums[2] = {kSums > 0 ? t.x[kSums > 0][token] : 0.f, kSums > 1 ? t.x[kSums > 1 ? 2 : 0][token] : 0.f};
        acc[i] = add_unit(parts, w.rows[i / 2], t.x[0][token], sums, acc[i]);
    }
}

// acc += weights·x over one unit. All pointers are to shared memory, `meta` with `meta_stride` floats
// between scales and sums. Of rows and tokens those with fewer fragments stay in registers.
template <class Block, int FRAGS_M, int NT>
__device__ __forceinline__ void multiply_unit(const u8* codes, const float* scales, const u8* q, const float* meta,
                                              int meta_stride, Sums<FRAGS_M, NT>& acc) {
    constexpr bool kRowsInner = FRAGS_M <= NT / 2;
    constexpr int kInner = kRowsInner ? FRAGS_M : NT / 2, kOuter = kRowsInner ? NT / 2 : FRAGS_M;
    RowFragment<Block> w[kRowsInner ? FRAGS_M : 1];
    TokenFragment<Block> t[kRowsInner ? 1 : NT / 2];
    const auto load_rows = [&](int m, RowFragment<Block>& to) {
        to.load(codes + m * 512, scales + scale_offset<Block>(16 * m));
    };
    const auto load_tokens = [&](int n, TokenFragment<Block>& to) { to.load(q + n * 512, meta + n * 16, meta_stride); };
#pragma unroll
    for (int i = 0; i < kInner; ++i) {
        if constexpr (kRowsInner) load_rows(i, w[i]);
        else load_tokens(i, t[i]);
    }
#pragma unroll
    for (int o = 0; o < kOuter; ++o) {
        if constexpr (kRowsInner) load_tokens(o, t[0]);
        else load_rows(o, w[0]);
#pragma unroll
        for (int i = 0; i < kInner; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int m = kRowsInner ? i : o, n = kRowsInner ? o : i;
                multiply_fragments<Block>(w[kRowsInner ? i : 0], t[kRowsInner ? 0 : i], half, acc[m][2 * n + half]);
            }
    }
}
