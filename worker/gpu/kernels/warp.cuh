// Reductions over a warp by butterfly, in a fixed order: every lane gets the result, the same bits in each.
#pragma once

constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000u);  // NVRTC's wheels carry no math_constants.h

template <int LANES = 32>
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int lane = LANES / 2; lane; lane /= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
    return v;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int lane = 16; lane; lane /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, lane));
    return v;
}
