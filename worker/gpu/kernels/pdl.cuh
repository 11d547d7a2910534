// Programmatic dependent launch (PDL, CUDA Programming Guide; sm_90 and later): a secondary kernel starts before
// its primary, the kernel launched before it on the stream, has ended.
//
// `launch_dependents`: once every block of the primary has called it, has called grid_dependency_wait, or has
// exited, the secondary's blocks may start. `grid_dependency_wait`: returns when the primary and everything
// launched before it are complete and their writes are visible. On an ordinary launch, and before sm_90, both
// do nothing. Host side: `Kernel` in worker/gpu/kernel.py.
//
// What a kernel may read before its wait:
// | data                               | kernels                      | why                                            |
// | ---------------------------------- | ---------------------------- | ---------------------------------------------- |
// | weights, biases, norm weights      | matvec, glu, experts_add,    | written at load only                           |
// |                                    | matmul, dequantize           |                                                |
// | RoPE tables, sinks                 | attention_decode             | written at load only                           |
// | positions, block tables            | attention_decode             | written by the host's copy or the preceding    |
// |                                    |                              | step's sampler, both before this graph         |
// | span, block table, count of a     | rope_kv, attention_prefill,  | written by the host's copy before the chunk's  |
// | chunk                              | matmul, scale_to_f16,        | graph                                          |
// |                                    | combine, group_routes        |                                                |
// | KV of earlier tokens or chunks     | attention_decode (newest     | written by earlier graphs; this graph writes   |
// |                                    | excluded), attention_prefill | only slots of its own tokens                   |
// | routes, residual                   | experts_add                  | written two launches earlier; see rule 3       |
// | the sampler's request              | sample                       | written by the host's copy or the preceding    |
// |                                    |                              | step's sampler, both before this graph         |
// Everything else is read after the wait: activations, logits, the other fields of the step state, partial
// results, counters. Every write comes after the wait too: the primary may still read what is overwritten.
// Loads of data that the primary writes must not be __restrict__ const: the compiler could move them above
// the wait.
//
// Rules:
// 1. A graph launch is an ordinary launch: the first kernel of a graph waits for all of the preceding graph.
//    "Before this graph" above relies on one step or one chunk per graph. Several steps in one graph need
//    positions and requests to be read after the wait.
// 2. A kernel may call launch_dependents before its wait only if its secondary reads, before its own wait,
//    nothing that this kernel or an incomplete earlier one writes. grid_dependency_wait calls
//    launch_dependents itself, after the wait.
// 3. If the primary calls launch_dependents only after its wait, everything before the primary is complete
//    when the secondary starts, so the secondary may also read the results of the launch before the primary.
//    experts_add (routes, residual) relies on glu doing so when it computes experts.
// 4. A block without work may exit without waiting if another block of its grid waits: the grid then ends
//    after the primary. When every block exits (the launches after the last layer's attention of a chunk
//    without requested logits), the grid may end before the primary; that is allowed because nothing reads
//    the result, and because a graph ends after all of its kernels.
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
