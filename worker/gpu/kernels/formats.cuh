// Weight formats on the device: `Unit<Block>`, kElements weights of one type in registers, and
// their conversions.
//
// A matrix is a flat sequence of units, row after row, spread over planes (codes.cuh, scales.cuh)
// so that every load is wide and aligned. Units of the block types have 32 elements with the values
// scale·(code - kZero) - min, each product and difference rounded once, as in gguf.quants. Units of
// F32, F16 and BF16 are 16 bytes of the file's own layout. Rows are multiples of 32 elements. Twin:
// `dequantize` in worker/quants.py. Sizes: worker/gpu/layouts.py. Writer: repack.cu.
#pragma once
#include "scales.cuh"

// CODES and SCALES as loaded. HAS_MIN: values have a minimum. TWO_SCALES: each half of a unit has
// its own scale.
template <class CODES, class SCALES, int ZERO, bool HAS_MIN = false, bool TWO_SCALES = false>
struct BlockUnit {
    static constexpr int kElements = 32, kZero = ZERO;
    static constexpr bool kHasMin = HAS_MIN, kTwoScales = TWO_SCALES, kSigned = ZERO == 0 && !HAS_MIN;
    CODES packed;
    SCALES scales;

    __device__ __forceinline__ void load(const Planes& p, u32 u) {
        packed.load(p, u);
        scales.load(p, u);
    }

    // Values in f32, bit for bit those of gguf.quants.
    __device__ __forceinline__ void to_float(u32 u, float (&v)[32]) const {
        const Codes c = packed.unpack();
        const Scales k = scales.unpack(u);
#pragma unroll
        for (int e = 0; e < 32; ++e) {
            const int code = (signed char)(c.w[e / 4] >> 8 * (e % 4)) - kZero;
            v[e] = __fmul_rn(k.scale[e / 16], (float)code);
            if (kHasMin) v[e] = __fsub_rn(v[e], k.min[e / 16]);
        }
    }

    // Values as pairs of f16: scale and minimum are rounded to f16, then the value is rounded once
    // more. The f16 with high byte 0x64 and low byte b is 1024 + b, so code - kZero is exact.
    __device__ __forceinline__ void to_half2(u32 u, u32 (&h)[16]) const {
        constexpr u32 zero = 0x64006400u + 0x00010001u * (kSigned ? 128 : kZero);
        const Codes c = packed.unpack();
        const Scales k = scales.unpack(u);
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const int half = i / 8;
            const u32 word = kSigned ? c.w[i / 2] ^ 0x80808080 : c.w[i / 2];
            const u32 code = half2_sub(__byte_perm(word, 0x64646464, i % 2 ? 0x4342 : 0x4140), zero);
            const u32 scale = floats_to_half2(k.scale[half], k.scale[half]);
            const u32 min = floats_to_half2(-k.min[half], -k.min[half]);
            h[i] = kHasMin ? half2_fma(code, scale, min) : half2_mul(code, scale);
        }
    }
};

template <class Block>
struct Unit;

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

template <> struct Unit<Q4_0> : BlockUnit<PackedCodes<4, 0>, F16Scale, 8> {};
template <> struct Unit<Q4_1> : BlockUnit<PackedCodes<4, 0>, F16ScaleMin, 0, true> {};
template <> struct Unit<Q5_0> : BlockUnit<PackedCodes<4, 1>, F16Scale, 16> {};
template <> struct Unit<Q5_1> : BlockUnit<PackedCodes<4, 1>, F16ScaleMin, 0, true> {};
template <> struct Unit<Q8_0> : BlockUnit<PackedCodes<8, 0>, F16Scale, 0> {};
template <> struct Unit<Q2_K> : BlockUnit<PackedCodes<2, 0>, Q2Scales, 0, true, true> {};
template <> struct Unit<Q3_K> : BlockUnit<PackedCodes<2, 1>, Q3Scales, 4, false, true> {};
template <> struct Unit<Q4_K> : BlockUnit<PackedCodes<4, 0>, KScaleMin, 0, true> {};
template <> struct Unit<Q5_K> : BlockUnit<PackedCodes<4, 1>, KScaleMin, 0, true> {};
template <> struct Unit<Q6_K> : BlockUnit<PackedCodes<4, 2>, Q6Scales, 32, false, true> {};
template <> struct Unit<MXFP4> : BlockUnit<Fp4Codes, E8m0Scale, 12> {};
template <> struct Unit<NVFP4> : BlockUnit<Fp4Codes, E4m3Scales, 12, false, true> {};
template <> struct Unit<IQ4_NL> : BlockUnit<Iq4Codes, F16Scale, 0> {};
template <> struct Unit<IQ4_XS> : BlockUnit<Iq4Codes, Iq4Scales, 0> {};
template <> struct Unit<IQ3_XXS> : BlockUnit<ValueCodes<PackedCodes<4, 0>, Iq3XxsValue>, CodebookScales<4>, 0> {};
template <> struct Unit<IQ3_S> : BlockUnit<ValueCodes<PackedCodes<4, 0>, Iq3SValue>, CodebookScales<1>, 0> {};
template <> struct Unit<IQ2> : BlockUnit<ValueCodes<PackedCodes<2, 1>, Iq2Value>, CodebookScales<8>, 0, false, true> {};
template <> struct Unit<IQ1> : BlockUnit<ValueCodes<PackedCodes<2, 1>, Iq1Value>, CodebookScales<8>, 0, false, true> {};
template <> struct Unit<TQ2_0> : BlockUnit<PackedCodes<2, 0>, SuperScale, 1> {};

template <>
struct Unit<F32> {
    static constexpr int kElements = 4;
    float4 f;
    __device__ __forceinline__ void load(const Planes& p, u32 u) { f = load_plane<float4>(p.low, u); }
    __device__ __forceinline__ void to_float(u32, float (&v)[4]) const { v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w; }
    __device__ __forceinline__ void to_half2(u32, u32 (&h)[2]) const {
        h[0] = floats_to_half2(f.x, f.y), h[1] = floats_to_half2(f.z, f.w);
    }
};

template <>
struct Unit<F16> {
    static constexpr int kElements = 8;
    uint4 packed;
    __device__ __forceinline__ void load(const Planes& p, u32 u) { packed = load_plane<uint4>(p.low, u); }
    __device__ __forceinline__ void to_float(u32, float (&v)[8]) const { unpack8(packed, v); }
    __device__ __forceinline__ void to_half2(u32, u32 (&h)[4]) const {
        h[0] = packed.x, h[1] = packed.y, h[2] = packed.z, h[3] = packed.w;
    }
};

template <>
struct Unit<BF16> {
    static constexpr int kElements = 8;
    uint4 packed;
    __device__ __forceinline__ void load(const Planes& p, u32 u) { packed = load_plane<uint4>(p.low, u); }
    __device__ __forceinline__ void to_float(u32, float (&v)[8]) const {
        const u32 pairs[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = __uint_as_float(i % 2 ? pairs[i / 2] & 0xffff0000 : pairs[i / 2] << 16);
    }
    __device__ __forceinline__ void to_half2(u32 u, u32 (&h)[4]) const {
        float v[8];
        to_float(u, v);
#pragma unroll
        for (int i = 0; i < 4; ++i) h[i] = floats_to_half2(v[2 * i], v[2 * i + 1]);
    }
};
