// A kernel that starts before its predecessor has ended (programmatic dependent launch, CUDA Programming Guide; sm_90).
//
// Before `wait_for_inputs` a kernel may read what nobody writes during a step (weights, tables, KV of earlier tokens) and
// what the launch before the last one left: a launch starts when every block of its predecessor has passed its own wait,
// which ends when the predecessor's predecessor is complete. After it, everything earlier is there. Blocks with nothing to do
// may leave without a wait if one of their grid waits: then the grid ends after those before it. (Of a piece whose logits
// nobody wants, all of the head's blocks leave; what is copied then nobody reads, and a graph ends after all of its nodes.)
// Launched the ordinary way, and on older devices, both lines do nothing. Host side: `Kernel` in worker/gpu/kernel.py.
#pragma once

__device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
