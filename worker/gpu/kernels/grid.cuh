// Block-wide prefix sums of integers, and the counters of a meeting of blocks.
// Users: row_board.cuh, select.cuh, sample.cu.
#pragma once

#include "arrival.cuh"

using u64 = unsigned long long;

struct Barrier {  // device memory, zero before the first launch
    unsigned int arrived, generation;
};

// Return the sum of `v` over the threads before this one; `total` is the sum over the block.
// Integers, so the order does not matter. `scratch` holds one value a warp; the block is
// synchronized before and after.
__device__ __forceinline__ u64 block_scan(u64 v, u64* scratch, u64& total) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    u64 up_to = v;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const u64 other = __shfl_up_sync(0xffffffffu, up_to, step);
        if (lane >= step) up_to += other;
    }
    __syncthreads();
    if (lane == 31) scratch[warp] = up_to;
    __syncthreads();
    u64 before = 0;
    total = 0;
    for (int w = 0; w < warps; ++w) {
        if (w < warp) before += scratch[w];
        total += scratch[w];
    }
    __syncthreads();
    return before + up_to - v;
}
