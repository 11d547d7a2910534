// Experts of decode's rows: chosen by a launch before (route.cu, route_rows.cu), or by each warp
// that needs them from the router's logits, which takes less time than a launch.
//
// Python: `_CHOICES` in worker/gpu/matvec.py.
#pragma once
#include "top_k.cuh"

struct ExpertChoices {
    const int* experts;    // [T, k] or null
    const float* weights;  // [T, k] or null
    const float* logits;   // [T, E], read without experts
    const float* scales;   // [E] or null: factors of the weights of `logits`
    int n_experts, k;

    __device__ __forceinline__ const float* logits_of(int t) const { return logits + (size_t)t * n_experts; }

    // The j-th expert of row t. Called by whole warps, as is `choice`.
    __device__ __forceinline__ int expert(int t, int j) const {
        return experts ? experts[t * k + j] : chosen_id(logits_of(t), n_experts, j);
    }
    __device__ __forceinline__ Choice choice(int t, int j) const {
        if (experts) return {experts[t * k + j], weights[t * k + j]};
        Choice c = choose(logits_of(t), n_experts, k);
        c = {__shfl_sync(0xffffffffu, c.expert, j), __shfl_sync(0xffffffffu, c.weight, j)};
        if (scales) c.weight = __fmul_rn(c.weight, scales[c.expert]);
        return c;
    }
};
