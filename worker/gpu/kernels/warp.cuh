// Warp reductions by butterfly shuffles: every lane gets the result with the same bits, since the
// order is fixed. Also the sum of squares of an RMSNorm. Every addition is written with its
// rounding.
#pragma once

constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000u);  // NVRTC's wheels carry no math_constants.h

template <int LANES = 32>
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int lane = LANES / 2; lane; lane /= 2) v = __fadd_rn(v, __shfl_xor_sync(0xffffffffu, v, lane));
    return v;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int lane = 16; lane; lane /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, lane));
    return v;
}

// fma(x, x, y²) + fma(z, z, w²).
__device__ __forceinline__ float sum_of_squares(float4 v) {
    return __fadd_rn(__fmaf_rn(v.x, v.x, __fmul_rn(v.y, v.y)), __fmaf_rn(v.z, v.z, __fmul_rn(v.w, v.w)));
}
