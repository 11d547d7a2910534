// Bulk copies to shared memory in PTX, and the barriers that count their bytes (sm_90 and later).
//
// PTX ISA, "cp.async.bulk" and "mbarrier". A barrier's phase completes when all its arrivals have
// happened and all expected bytes have been copied; phases alternate in parity, from 0, and the one
// before the first counts as complete. Addresses of shared memory are those of its own address
// space.
#pragma once

// A CUtensorMap, a `__grid_constant__` parameter.
struct __align__(64) TensorMap {
    unsigned long long opaque[16];
};

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void init_barrier(unsigned int barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Make barriers that this thread initialized visible to copies.
__device__ __forceinline__ void fence_barriers() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Make this thread's stores to shared memory visible to tensor cores and copies.
__device__ __forceinline__ void fence_shared_stores() { fence_barriers(); }

// Arrive at a barrier whose phase completes after `bytes` more bytes.
__device__ __forceinline__ void expect_bytes(unsigned int barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Count as `arrivals` arrivals.
__device__ __forceinline__ void arrive(unsigned int barrier, int arrivals) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Begin to copy `bytes`, a multiple of 16, between addresses that are multiples of 16.
__device__ __forceinline__ void copy_bulk(unsigned int to, const void* from, int bytes, unsigned int barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// Begin to copy the box of a tensor map whose first element is at (column, row).
__device__ __forceinline__ void copy_box(unsigned int to, const TensorMap& from, int column, int row, unsigned int barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(&from), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

// Block until the phase of this parity is complete.
__device__ __forceinline__ void wait_for_phase(unsigned int barrier, int parity) {
    unsigned int complete;
    do {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(complete)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    } while (!complete);
}
#endif
