// Programmatic dependent launch (PDL; CUDA Programming Guide; sm_90 and later).
//
// A secondary kernel starts before its primary, the kernel launched before it on the stream, has
// ended. Its blocks may start once every block of the primary has called `launch_dependents` or
// `grid_dependency_wait`, or has exited. `grid_dependency_wait` returns when the primary and all
// launches before it are complete and their writes are visible. On an ordinary launch, and before
// sm_90, both functions do nothing. Host side: `Kernel` in worker/gpu/kernel.py.
//
// Data that a kernel may read before its wait:
//
// | data                            | kernels                        | why                        |
// | ------------------------------- | ------------------------------ | -------------------------- |
// | weights, biases, norm weights   | matvec, glu, experts_add,      | written at load only       |
// |                                 | matmul, matmul_wgmma, _rope,   |                            |
// |                                 | _short,                        |                            |
// |                                 | scale_to_f16,                  |                            |
// |                                 | route_rows, grouped_experts,   |                            |
// |                                 | experts_mma, quantize_rows,    |                            |
// |                                 | head_norms, norm_add,          |                            |
// |                                 | attention_decode               |                            |
// | RoPE tables                     | attention_decode, _few_rows,   | written at load only       |
// |                                 | _rows                          |                            |
// | row slots, positions, tables    | attention_decode, _few_rows,   | before this graph (1)      |
// |                                 | _rows, _items, kv_rows         |                            |
// | requests, positions, end ids    | sample                         | before this graph (1)      |
// | and limits of slots; row_slots  |                                |                            |
// | rows, tiles and size of a       | rope_kv, attention_prefill,    | uploaded before this graph |
// | prefill batch                   | attention_wgmma,               |                            |
// |                                 | matmul, matmul_wgmma, _rope,   |                            |
// |                                 | _short,                        |                            |
// |                                 | scale_to_f16, combine,         |                            |
// |                                 | group_routes, norm_add,        |                            |
// |                                 | branches_norm_add, gate_group, |                            |
// |                                 | add_normed_groups,             |                            |
// |                                 | attention_512_chunk            |                            |
// | block tables of a prefill batch | attention_prefill              | uploaded before this graph |
// | list of attention_items         | attention_rows, _few_rows      | fence before launch (5)    |
// | KV of earlier tokens or chunks  | attention_decode, _few_rows,   | this graph writes only the |
// |                                 | _rows, attention_prefill       | KV of its own tokens       |
// | KV of this step's rows, written | attention_rows, _few_rows      | fence before launch (5)    |
// | by kv_rows                      |                                |                            |
// | choices or logits, and residual | experts_add                    | two launches earlier (3)   |
// | x, with logits                  | glu for experts                | two launches earlier (3)   |
// | tiles of pairs                  | grouped_experts and            | two launches earlier (3)   |
// |                                 | experts_mma for down           |                            |
//
// Everything else is read after the wait: activations, logits, partial results, counters. All
// writes but those of attention_items come after the wait, because earlier kernels may still read
// the memory. A plain load of data that the primary writes must not go through a
// `const __restrict__` pointer: the compiler could move it above the wait.
//
// Rules:
// 1. The first kernel of a graph waits for the complete preceding graph or copy. Row slots,
//    positions, tables and requests are written by a copy or by the preceding step's sampler, those
//    of draft tokens by draft_rows, a graph of its own; reading them before the wait is valid
//    because a graph holds one step. Several steps in one graph, or steps without a graph and
//    without a copy between them, would need the reads after the wait.
// 2. A kernel may call launch_dependents before its wait if its secondary reads, before its own
//    wait, only data that no incomplete kernel writes. grid_dependency_wait calls it afterwards.
//    The first call of a thread is the one of its block.
// 3. If a primary calls launch_dependents only after its wait, all launches before the primary are
//    complete when the secondary starts, and the secondary may read their results before its wait.
//    glu does so for experts, and experts_add relies on it, as do the two launches of
//    grouped_experts or experts_mma; and the router's matvec, on which glu with logits relies.
// 4. A block without work may exit without a wait if another block of its grid waits: the grid then
//    ends after its primary. If all blocks exit, the grid may end before its primary. That happens
//    after the last layer's attention of a chunk without requested logits; it is valid because the
//    results are not read and a graph ends after all of its kernels.
// 5. attention_items writes its list before its wait, since no earlier launch of the graph reads
// it,
//    and calls launch_dependents only after a fence and a barrier of the block that follow the
//    writes. Every later launch of the graph starts after that, so it may read the list before its
//    wait; it reads it through L2, since L1 is not coherent. kv_rows does the same for the keys and
//    values that attention_rows and attention_few_rows read from the cache, past L1.
#pragma once

__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Wait, and let no dependent start before launch_dependents is called or the block exits.
__device__ __forceinline__ void grid_dependency_wait_only() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
