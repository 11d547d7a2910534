// Warp reductions by butterfly shuffles, in a fixed order: every lane gets the result with the same
// bits, of `transposed_sum` a result of its own. Also running sums, and the sum of squares of an
// RMSNorm. Every addition is written with its rounding.
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

// The sum of v over the lanes up to this one.
__device__ __forceinline__ int inclusive_sum(int v) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int below = __shfl_up_sync(0xffffffffu, v, step);
        if (lane >= step) v += below;
    }
    return v;
}

// fma(x, x, y²) + fma(z, z, w²).
__device__ __forceinline__ float sum_of_squares(float4 v) {
    return __fadd_rn(__fmaf_rn(v.x, v.x, __fmul_rn(v.y, v.y)), __fmaf_rn(v.z, v.z, __fmul_rn(v.w, v.w)));
}

// One step of a sum over the warp: lanes with the bit HALF keep the upper half of 2·HALF values.
template <int HALF>
__device__ __forceinline__ void add_halves(float (&v)[32]) {
    const bool upper = threadIdx.x & HALF;
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
        const float low = v[i], high = v[i + HALF];
        v[i] = __fadd_rn(upper ? high : low, __shfl_xor_sync(0xffffffffu, upper ? low : high, HALF));
    }
}

// Add the 32 values of each lane over the warp: lane i returns the sum of the values i.
__device__ __forceinline__ float transposed_sum(float (&v)[32]) {
    add_halves<16>(v), add_halves<8>(v), add_halves<4>(v), add_halves<2>(v), add_halves<1>(v);
    return v[0];
}
