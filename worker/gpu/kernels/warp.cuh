// Reductions in a fixed order: over a warp by butterfly, over a block through one float a warp in shared memory.
//
// Every thread gets the result, the same bits in each. block_* synchronize before and after, so `scratch` (one float a
// warp, 32 of them suffice) can be used again at once.
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

__device__ __forceinline__ float block_sum(float v, float* scratch) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    v = warp_sum(v);
    __syncthreads();
    if (lane == 0) scratch[warp] = v;
    __syncthreads();
    const float total = warp_sum(lane < warps ? scratch[lane] : 0.f);
    __syncthreads();
    return total;
}

__device__ __forceinline__ float block_max(float v, float* scratch) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    v = warp_max(v);
    __syncthreads();
    if (lane == 0) scratch[warp] = v;
    __syncthreads();
    const float highest = warp_max(lane < warps ? scratch[lane] : -kInfinity);
    __syncthreads();
    return highest;
}
