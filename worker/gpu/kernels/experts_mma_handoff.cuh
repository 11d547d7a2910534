// Shared memory of an experts' product on the int8 tensor cores, and how its multipliers and
// finishers wait for each other.
#pragma once
#include "experts_mma_sums.cuh"

// Narrow tiles leave room for the starts of sums, which save the instructions that subtract the
// zero point from codes.
template <int MAX_NT>
constexpr bool kNarrow = MAX_NT <= 2;
template <int MAX_NT>
constexpr int kSlots = kNarrow<MAX_NT> ? MMA_SLOTS : MMA_WIDE_SLOTS;

// Dynamic shared memory; the ring of stages and x follow. Python: `_mma_bytes`.
template <int MAX_NT>
struct MmaShared {
    float4 partials[kSlices * 32 * MAX_NT];
    TilePairs<MAX_NT> pairs;
    IntBias bias;
    unsigned long long full[8], stored[kFinishers], added;  // barriers: a slot is copied; see `Handoff`
    __device__ __forceinline__ u8* ring() { return reinterpret_cast<u8*>(this + 1); }
    template <int NT>
    __device__ __forceinline__ auto* x(int units) {
        return reinterpret_cast<PairRecord<kGroups<NT>, kNarrow<MAX_NT>>*>(ring() + kSlots<MAX_NT> * stage_bytes(units));
    }
};

// Finishers of a chunk: with fewer than 3 groups of pairs they take turns, so that one writes
// results while others add.
__device__ constexpr int finishers_of(int groups) { return groups < 3 ? groups : kFinishers; }
__device__ constexpr int turns_of(int groups) { return kFinishers / finishers_of(groups); }

// What multipliers and the finishers of a chunk wait for, in each of its stages:
//
// | multipliers                              | finishers                            |
// | ---------------------------------------- | ------------------------------------ |
// | `wait_for_stage`, multiply               |                                      |
// | `wait_until_added`: the stage before     |                                      |
// | store partial sums, `report_stored`      | `wait_until_stored`                  |
// |                                          | copy a stage, add, `report_added`    |
// A chunk has an even number of stages: its barrier `stored`, one for each turn, starts with parity
// 0.
// Before sm_90 two barriers of the block do the same, and all finishers take part.
template <int MAX_NT>
struct Handoff {
    u32 full, stored, added;
    int slot, slot_parity, parity;  // of the next stage
    __device__ __forceinline__ explicit Handoff(MmaShared<MAX_NT>& shared)
        : full((u32)__cvta_generic_to_shared(shared.full)), stored((u32)__cvta_generic_to_shared(shared.stored)),
          added((u32)__cvta_generic_to_shared(&shared.added)), slot(0), slot_parity(0), parity(0) {}
    // By one thread of the warp that copies, before it does. A barrier must follow.
    __device__ __forceinline__ void init() const {
#if __CUDA_ARCH__ >= 900
#pragma unroll
        for (int i = 0; i < kSlots<MAX_NT>; ++i) init_barrier(full + 8 * i, 1);
#pragma unroll
        for (int i = 0; i < kFinishers; ++i) init_barrier(stored + 8 * i, kSlices);
        init_barrier(added, kFinishers);
        fence_barriers();
#endif
    }
    // Returns the slot.
    __device__ __forceinline__ int wait_for_stage() {
        const int at = slot;
#if __CUDA_ARCH__ >= 900
        wait_for_phase(full + 8 * slot, slot_parity);
#else
        __syncthreads();
#endif
        if (++slot == kSlots<MAX_NT>) slot = 0, slot_parity ^= 1;
        return at;
    }
    __device__ __forceinline__ void wait_until_added() {
#if __CUDA_ARCH__ >= 900
        parity ^= 1;
        wait_for_phase(added, parity);
#endif
    }
    __device__ __forceinline__ void report_stored(int turn) const {
#if __CUDA_ARCH__ >= 900
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive(stored + 8 * turn, 1);
#else
        __syncthreads();
#endif
    }
    __device__ __forceinline__ void wait_until_stored(int turn, int stage) const {
#if __CUDA_ARCH__ >= 900
        wait_for_phase(stored + 8 * turn, stage % 2);
#else
        wait_for_copies<kSlots<MAX_NT> - 1>();
        __syncthreads();  // `wait_for_stage`
        __syncthreads();
#endif
    }
    // `arrivals`: kFinishers in all from the finishers of a chunk.
    __device__ __forceinline__ void report_added(int arrivals) const {
#if __CUDA_ARCH__ >= 900
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive(added, arrivals);
#endif
    }
};
