// Choice of the k highest of E logits by one warp: descending, ties to the lower id, and the
// softmax over those k only.
//
// The weights are summed by the warp's butterfly, lane j holding the j-th choice.
// Twin: `top_k` in worker/cpu/plain.py.
#pragma once
#include "warp.cuh"

// Sort key: ascending by logit, then by descending id; never 0, which marks a chosen expert. A NaN
// gets some valid place.
__device__ __forceinline__ unsigned long long key_of(float logit, int id) {
    const unsigned int bits = __float_as_uint(logit + 0.f);  // -0 becomes 0
    const unsigned int ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
    return (unsigned long long)ordered << 32 | (0xffffffffu - id);
}

// The j-th choice, in lane j: its id and its weight. E ≤ 32·PER_LANE, k ≤ 32.
struct Choice {
    int expert;
    float weight;
};

template <int PER_LANE>
__device__ __forceinline__ Choice choose(const float* logits, int n_experts, int k) {
    const int lane = threadIdx.x % 32;
    unsigned long long keys[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        const int id = 32 * i + lane;
        keys[i] = id < n_experts ? key_of(logits[id], id) : 0;
    }
    float highest = 0.f, weight = 0.f;
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
        const float logit = logits[id];
        if (j == 0) highest = logit;
        if (lane == j) chosen = id, weight = expf(logit - highest);
    }
    return {chosen, __fdiv_rn(weight, warp_sum(weight))};
}
