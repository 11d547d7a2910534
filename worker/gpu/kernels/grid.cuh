// All blocks of a grid meeting, and block-wide sums of integers.
//
// The barrier needs every block resident at once: launch at most one block per multiprocessor. `Barrier` is device
// memory of zeros; it is left ready for the next launch of the same number of blocks.
#pragma once

#include "arrival.cuh"

using u64 = unsigned long long;

struct Barrier {
    unsigned int arrived, generation;
};

__device__ __forceinline__ void grid_barrier(Barrier* barrier) {
    __syncthreads();
    if (threadIdx.x == 0) {
        const unsigned int before = load_acquire(&barrier->generation);
        if (arrive(&barrier->arrived, gridDim.x - 1) == gridDim.x - 1) {
            store_release(&barrier->generation, before + 1);
        } else {
            while (load_acquire(&barrier->generation) == before) {
            }
        }
    }
    __syncthreads();
}

// Sum of `v` over the threads before this one, and over all of them. Integers: any order gives the same bits.
// `scratch` holds a value a warp; synchronized before and after.
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
