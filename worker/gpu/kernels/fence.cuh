// Order between blocks: what this thread saw and wrote before the fence comes before all that it does after it, to the
// whole device; behind a block's barrier the same is true of its block.
//
// Acquire and release (PTX ISA, "Memory consistency model"): CUDA's own __threadfence is sequentially consistent, which
// nothing here needs and every step would wait for.
#pragma once

__device__ __forceinline__ void fence_device() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
