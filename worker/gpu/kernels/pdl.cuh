// A kernel that starts before its predecessor has ended (programmatic dependent launch, CUDA Programming Guide; sm_90).
//
// A launch starts when each block of its predecessor has called `launch_dependents` or `grid_dependency_wait`, or has ended. Before
// its own wait, which ends when the predecessor is complete and with it everything earlier, it may read what nobody writes
// during a step: weights, tables, KV of earlier tokens. Behind a predecessor that only waits, also what the launch before
// that one left. Blocks with nothing to do may leave without a wait if one of their grid waits: then the grid ends after
// those before it. (Of a piece whose logits nobody wants, all blocks leave of what follows the last layer's attention; what is
// copied then nobody reads, and a graph ends after all of its nodes.)
// Launched the ordinary way, and on older devices, these lines do nothing. Host side: `Kernel` in worker/gpu/kernel.py.
#pragma once

__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
