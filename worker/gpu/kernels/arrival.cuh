// How blocks of a grid learn that what others wrote is there: they arrive at a counter in device memory.
//
// Acquire and release (PTX ISA, "Memory consistency model") as part of the access itself: behind a block's barrier they hold
// for the block. A fence beside it, let alone CUDA's sequentially consistent __threadfence, is one more wait a step.
#pragma once

// Counts an arrival; the number of those before it. After `last` of them the counter is zero again.
__device__ __forceinline__ unsigned int arrive(unsigned int* counter, unsigned int last) {
    unsigned int before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(last) : "memory");
    return before;
}

__device__ __forceinline__ unsigned int load_acquire(const unsigned int* from) {
    unsigned int v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}

__device__ __forceinline__ void store_release(unsigned int* to, unsigned int v) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
}

// Whether this block is the last of `blocks`, so that all that they wrote before can be read. All its threads take part.
__device__ __forceinline__ bool arrives_last(unsigned int* counter, int blocks) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) last = arrive(counter, blocks - 1) == blocks - 1;
    __syncthreads();
    return last;
}
