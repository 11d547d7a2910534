// Router: the k highest of E logits in descending order, ties to the lower id, and the softmax over
// those k only.
//
// Shapes: logits [T, E] f32; experts [T, k] i32, weights [T, k] f32; E ≤ 32·PER_LANE, k ≤ 32.
// Grid: ⌈T/4⌉ blocks of 128 threads, one warp a token. Alignment: 4 bytes. Bytes: 4·E read and 8·k
// written a token. The weights are summed by the warp's butterfly, lane j holding the j-th choice.
// Twin: `top_k` in worker/cpu/plain.py. Launcher: worker/gpu/matvec.py.
#include "pdl.cuh"
#include "warp.cuh"

// Sort key: ascending by logit, then by descending id; never 0, which marks a chosen expert. A NaN
// gets some valid place.
__device__ __forceinline__ unsigned long long key_of(float logit, int id) {
    const unsigned int bits = __float_as_uint(logit + 0.f);  // -0 becomes 0
    const unsigned int ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
    return (unsigned long long)ordered << 32 | (0xffffffffu - id);
}

template <int PER_LANE>
__global__ void __launch_bounds__(32 * ROUTE_TOKENS)
    route(int* experts, float* weights, const float* logits, int n_tokens, int n_experts, int k) {
    const int t = blockIdx.x * ROUTE_TOKENS + threadIdx.x / 32, lane = threadIdx.x % 32;
    launch_dependents();
    grid_dependency_wait();
    if (t >= n_tokens) return;
    unsigned long long keys[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        const int id = 32 * i + lane;
        keys[i] = id < n_experts ? key_of(logits[(size_t)t * n_experts + id], id) : 0;
    }
    float highest = 0.f, weight = 0.f;  // lane j holds the j-th choice
    int chosen = 0;
    for (int j = 0; j < k; ++j) {
        unsigned long long best = 0;
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) best = max(best, keys[i]);
#pragma unroll
        for (int step = 16; step; step /= 2) best = max(best, __shfl_xor_sync(0xffffffffu, best, step));
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) keys[i] = keys[i] == best ? 0 : keys[i];
        const int id = 0xffffffffu - (unsigned int)best;
        const float logit = logits[(size_t)t * n_experts + id];
        if (j == 0) highest = logit;
        if (lane == j) chosen = id, weight = expf(logit - highest);
    }
    const float total = warp_sum(weight);
    if (lane >= k) return;
    experts[(size_t)t * k + lane] = chosen;
    weights[(size_t)t * k + lane] = __fdiv_rn(weight, total);
}
