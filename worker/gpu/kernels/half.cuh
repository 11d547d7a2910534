// Conversions between f16 and f32, and arithmetic on pairs of f16, in PTX: NVRTC's wheels carry no
// cuda_fp16.h.
//
// An f16 is an unsigned short, a pair an unsigned int with the lower index in the lower bits.
// Rounding is to nearest even. f16 subnormals are kept: -ftz=true applies to f32 only, and every
// f16 is a normal f32 or zero.
#pragma once

__device__ __forceinline__ float half_to_float(unsigned short h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

__device__ __forceinline__ unsigned short float_to_half(float f) {
    unsigned short h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

__device__ __forceinline__ float2 half2_to_float2(unsigned int pair) {
    float2 f;
    asm("{ .reg .b16 lo, hi; mov.b32 {lo, hi}, %2; cvt.f32.f16 %0, lo; cvt.f32.f16 %1, hi; }"
        : "=f"(f.x), "=f"(f.y)
        : "r"(pair));
    return f;
}

__device__ __forceinline__ unsigned int floats_to_half2(float lower, float upper) {
    unsigned int pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(upper), "f"(lower));
    return pair;
}

__device__ __forceinline__ unsigned int half2_sub(unsigned int a, unsigned int b) {
    unsigned int r;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
__device__ __forceinline__ unsigned int half2_mul(unsigned int a, unsigned int b) {
    unsigned int r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
__device__ __forceinline__ unsigned int half2_fma(unsigned int a, unsigned int b, unsigned int c) {
    unsigned int r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

// Clamp to ±65504: an infinity in the KV cache or in an operand would turn a masked product 0·∞
// into NaN.
__device__ __forceinline__ float clamp_to_half_range(float f) {
    return f > 65504.f ? 65504.f : (f < -65504.f ? -65504.f : f);
}

// Convert the eight f16 of one 16-byte load to f32.
__device__ __forceinline__ void unpack8(const uint4 packed, float (&out)[8]) {
    const unsigned int pairs[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 f = half2_to_float2(pairs[i]);
        out[2 * i] = f.x;
        out[2 * i + 1] = f.y;
    }
}

// Four halves of a key or value.
__device__ __forceinline__ uint2 halves_of(const float4 x) {
    return make_uint2(floats_to_half2(clamp_to_half_range(x.x), clamp_to_half_range(x.y)),
                      floats_to_half2(clamp_to_half_range(x.z), clamp_to_half_range(x.w)));
}
