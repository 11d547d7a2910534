// Synchronization between the blocks of a grid through a counter in device memory.
//
// Acquire and release semantics (PTX ISA, "Memory consistency model") are part of the access itself
// and, combined with a block barrier, hold for the whole block. A separate fence, or CUDA's
// sequentially consistent __threadfence, would add a wait to every decode step.
#pragma once

// Count an arrival and return the number of earlier ones. The counter wraps to zero after `last`.
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

__device__ __forceinline__ void add_release(unsigned int* to, unsigned int v) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
}

// Whether this block is the last of `blocks` to arrive: it can then read what the others wrote
// before. Called by all threads of the block.
__device__ __forceinline__ bool arrives_last(unsigned int* counter, int blocks) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) last = arrive(counter, blocks - 1) == blocks - 1;
    __syncthreads();
    return last;
}
