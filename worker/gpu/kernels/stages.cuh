// Stages of shared memory that bulk copies fill and tensor cores read, with their barriers. Users:
// wgmma_ring.cuh, matmul_wgmma_short.cu, attention_wgmma.cu.
#pragma once
#include "bulk_copy.cuh"

// A ring of stages in dynamic shared memory. A stage is full, then empty again, once each lap.
template <int STAGES>
struct Stages {
    unsigned int memory, barriers;  // addresses; the memory is aligned to 1,024 bytes

    __device__ __forceinline__ Stages(unsigned char* shared, unsigned long long (&barriers)[2 * STAGES])
        : memory(((unsigned int)__cvta_generic_to_shared(shared) + 1023) & ~1023u),
          barriers((unsigned int)__cvta_generic_to_shared(barriers)) {}
    __device__ __forceinline__ unsigned int full(int stage) const { return barriers + 8 * stage; }
    __device__ __forceinline__ unsigned int empty(int stage) const { return barriers + 8 * (STAGES + stage); }
    // Arrivals that make a stage full (with the bytes of its copies) and empty. A barrier of the
    // block must follow.
    __device__ __forceinline__ void init(int arrivals_full, int arrivals_empty) const {
        for (int i = 0; i < STAGES; ++i) {
            init_barrier(full(i), arrivals_full);
            init_barrier(empty(i), arrivals_empty);
        }
        fence_barriers();
    }
};
