// Router: the k highest of E logits in descending order, ties to the lower id, and the softmax over
// those k only, times the experts' scales, if any.
//
// Shapes: logits [T, E] f32; scales [E] f32 or null; experts [T, k] i32, weights [T, k] f32; k ≤
// 32.
// Grid: ⌈T/4⌉ blocks of 128 threads, one warp a token. Alignment: 4 bytes. Bytes: 4·E read and 8·k
// written a token. Order: top_k.cuh.
// Twin: `norm_route` in worker/cpu/ops.py. Launcher: worker/gpu/matvec.py.
#include "pdl.cuh"
#include "top_k.cuh"

__global__ void __launch_bounds__(32 * ROUTE_TOKENS)
    route(int* experts, float* weights, const float* logits, const float* scales, int n_tokens, int n_experts, int k) {
    const int t = blockIdx.x * ROUTE_TOKENS + threadIdx.x / 32, lane = threadIdx.x % 32;
    launch_dependents();
    grid_dependency_wait();
    if (t >= n_tokens) return;
    const Choice choice = choose(logits + (size_t)t * n_experts, n_experts, k);
    if (lane >= k) return;
    experts[(size_t)t * k + lane] = choice.expert;
    weights[(size_t)t * k + lane] = scales ? __fmul_rn(choice.weight, scales[choice.expert]) : choice.weight;
}
