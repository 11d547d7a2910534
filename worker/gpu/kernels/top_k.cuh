// Choice of the k highest of E logits by one warp: descending, ties to the lower id, and the
// softmax over those k only.
//
// The weights are summed by the warp's butterfly, lane j holding the j-th choice.
// Twin: `top_k` in worker/cpu/plain.py.
#pragma once
#include "warp.cuh"

using Key = unsigned long long;

// Sort key: ascending by logit, then by descending id; never 0. A NaN gets some valid place.
__device__ __forceinline__ Key key_of(float logit, int id) {
    const unsigned int bits = __float_as_uint(logit + 0.f);  // -0 becomes 0
    const unsigned int ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
    return (Key)ordered << 32 | (0xffffffffu - id);
}
__device__ __forceinline__ int id_of(Key key) { return 0xffffffffu - (unsigned int)key; }
__device__ __forceinline__ float logit_of(Key key) {
    const unsigned int ordered = key >> 32;
    return __uint_as_float(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}

// The highest key of E logits below `bound`. Called by all lanes of a warp.
__device__ __forceinline__ Key highest_key(const float* logits, int n_experts, Key bound) {
    Key best = 0;
    for (int id = threadIdx.x % 32; id < n_experts; id += 32) {
        const Key key = key_of(logits[id], id);
        if (key < bound) best = max(best, key);
    }
    const unsigned int high = __reduce_max_sync(0xffffffffu, (unsigned int)(best >> 32));
    const unsigned int low = best >> 32 == high ? (unsigned int)best : 0;
    return (Key)high << 32 | __reduce_max_sync(0xffffffffu, low);
}

// The j-th choice, in lane j: its id and its weight. k ≤ 32 and k ≤ E.
struct Choice {
    int expert;
    float weight;
};

__device__ __forceinline__ Choice choose(const float* logits, int n_experts, int k) {
    float highest = 0.f, weight = 0.f;
    int chosen = 0;
    Key key = ~0ull;
#pragma unroll 1
    for (int j = 0; j < k; ++j) {
        key = highest_key(logits, n_experts, key);
        if (j == 0) highest = logit_of(key);
        if (threadIdx.x % 32 == j) chosen = id_of(key), weight = expf(logit_of(key) - highest);
    }
    return {chosen, __fdiv_rn(weight, warp_sum(weight))};
}

// The id of choice `rank` alone.
__device__ __forceinline__ int chosen_id(const float* logits, int n_experts, int rank) {
    Key key = ~0ull;
#pragma unroll 1
    for (int j = 0; j <= rank; ++j) key = highest_key(logits, n_experts, key);
    return id_of(key);
}
