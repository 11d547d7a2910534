// RMSNorm of a head of D elements in a warp, in registers.
//
//   x = x / sqrt(mean(x²) + eps) · weight
// Lane l has the elements l, l + 32, … Order and rounding: a lane's squares ascending by fused
// additions, then the warp's butterfly; as in the twin, the factor 1/sqrt is rounded twice, and
// each product once.
// Twin: `rms_norm` in worker/cpu/plain.py. Users: head_norms.cu; rope_kv.cu, attention_decode.cu
// and attention_512.cu, whose kernels take `HeadNorms` as an optional last parameter.
#pragma once
#include "warp.cuh"

// The norm of a kind of heads: weight [D] f32, or null for 1. A negative eps: no norm.
struct HeadNorm {
    const float* weight;
    float eps;
};
struct HeadNorms {
    HeadNorm q, k, v;
};

template <int D>
struct WarpHead {
    float x[D / 32], weight[D / 32];

    // The weight is constant during a step: it may be read before the wait (pdl.cuh).
    __device__ __forceinline__ void load_weight(const HeadNorm norm) {
#pragma unroll
        for (int i = 0; i < D / 32; ++i) weight[i] = norm.weight ? norm.weight[threadIdx.x % 32 + 32 * i] : 1.f;
    }
    __device__ __forceinline__ void load(const float* head) {
#pragma unroll
        for (int i = 0; i < D / 32; ++i) x[i] = head[threadIdx.x % 32 + 32 * i];
    }
    // Without a norm the head stays as it is.
    __device__ __forceinline__ void normalize(const HeadNorm norm) {
        if (norm.eps < 0.f) return;
        float squares = 0.f;
#pragma unroll
        for (int i = 0; i < D / 32; ++i) squares = __fmaf_rn(x[i], x[i], squares);
        const float mean = __fdiv_rn(warp_sum(squares), (float)D);
        const float factor = __frcp_rn(__fsqrt_rn(__fadd_rn(mean, norm.eps)));
#pragma unroll
        for (int i = 0; i < D / 32; ++i) x[i] = __fmul_rn(__fmul_rn(x[i], factor), weight[i]);
    }
    __device__ __forceinline__ void store(float* head) const {
#pragma unroll
        for (int i = 0; i < D / 32; ++i) head[threadIdx.x % 32 + 32 * i] = x[i];
    }
};

// The GROUP query heads of a KV head, and where the block writes them its key and value: normalized
// into shared memory, a warp a head.
template <int D, int GROUP, int WARPS>
struct NormedGroup {
    static constexpr int kKey = GROUP, kValue = GROUP + 1, kEach = (GROUP + 1 + WARPS) / WARPS;
    WarpHead<D> heads[kEach];

    // Before the wait. `own`: the block writes the key and the value.
    __device__ __forceinline__ void load_weights(bool own, const HeadNorms& norms) {
        for_each(own, [&](int i, int head) { heads[i].load_weight(norm_of(head, norms)); });
    }
    // Store the heads in `to` [GROUP + 2][D]; ends with a barrier.
    __device__ __forceinline__ void normalize(bool own, const float* q, const float* k, const float* v, float* to,
                                              const HeadNorms& norms) {
        for_each(own, [&](int i, int head) { heads[i].load(head < kKey ? q + head * D : head == kKey ? k : v); });
        for_each(own, [&](int i, int head) {
            heads[i].normalize(norm_of(head, norms));
            heads[i].store(to + head * D);
        });
        __syncthreads();
    }

private:
    __device__ __forceinline__ static HeadNorm norm_of(int head, const HeadNorms& norms) {
        return head < kKey ? norms.q : head == kKey ? norms.k : norms.v;
    }
    template <class Use>
    __device__ __forceinline__ static void for_each(bool own, Use use) {
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const int head = threadIdx.x / 32 + i * WARPS;
            if (head < (own ? kValue + 1 : GROUP)) use(i, head);
        }
    }
};
