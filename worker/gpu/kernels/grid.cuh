// Block-wide prefix sums of integers.
// Users: row_exchange.cuh, select.cuh, sample.cu.
#pragma once

#include "arrival.cuh"

using u64 = unsigned long long;

// Of threads or blocks: a number of ids and their mass.
struct Tally {
    u64 mass;
    unsigned int count;
};

// The sums over the threads before this one, and over the block.
struct Scan {
    Tally before, all;
};

// Integers, so the order does not matter. Not inlined: a cold instruction cache makes each copy as
// slow as the first one.
__device__ __noinline__ Scan block_scan(Tally mine) {
    __shared__ Tally warps[THREADS / 32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Scan scan = {mine, {0, 0}};
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const u64 mass = __shfl_up_sync(0xffffffffu, scan.before.mass, step);
        const unsigned int count = __shfl_up_sync(0xffffffffu, scan.before.count, step);
        if (lane >= step) scan.before.mass += mass, scan.before.count += count;
    }
    __syncthreads();
    if (lane == 31) warps[warp] = scan.before;
    __syncthreads();
    scan.before.mass -= mine.mass, scan.before.count -= mine.count;
#pragma unroll
    for (int w = 0; w < THREADS / 32; ++w) {
        const Tally tally = warps[w];
        if (w < warp) scan.before.mass += tally.mass, scan.before.count += tally.count;
        scan.all.mass += tally.mass, scan.all.count += tally.count;
    }
    return scan;
}
