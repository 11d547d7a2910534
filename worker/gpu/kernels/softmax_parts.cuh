// Softmax-weighted sums that several warps or blocks found of different positions, and how they become one result.
//
// A part holds, of GROUP heads, sums [GROUP][D] of weights exp2(score - peak)·value, then (peak, total) [GROUP][2], and is
// 16-byte aligned. Parts are added by log-sum-exp in a fixed order (flash-decoding, Dao et al. 2023), for a target: one part
// more, or the result.
#pragma once
#include "quantized.cuh"
#include "warp.cuh"

constexpr int kMaxParts = 64;
constexpr float kLog2e = 1.4426950408889634f;

__host__ __device__ constexpr int part_floats(int head_dim, int group) { return (group * (head_dim + 2) + 3) / 4 * 4; }

struct NextPart {  // one part more, at `out`, of all that were added
    float* out;
    template <int D, int GROUP>
    __device__ __forceinline__ float end(int g, float peak, float total) const {
        if (threadIdx.x % 32 == 0) *reinterpret_cast<float2*>(out + GROUP * D + 2 * g) = make_float2(peak, total);
        return 1.f;
    }
    template <int D, int GROUP>
    __device__ __forceinline__ void store(const float4 sum, int at) const {
        if (at < GROUP * D) *reinterpret_cast<float4*>(out + at) = sum;
    }
};

struct Result {  // the softmax's end: rows [GROUP][D] that begin at element `column` of a row of `cols`
    float* y;
    u8* q8;
    Meta* meta;
    const float* sinks;  // of the GROUP heads, or null
    int column, cols;
    template <int D, int GROUP>
    __device__ __forceinline__ float end(int g, float peak, float total) const {
        return 1.f / (sinks ? total + exp2f(sinks[g] * kLog2e - peak) : total);
    }
    template <int D, int GROUP>
    __device__ __forceinline__ void store(const float4 sum, int at) const {
        const bool real = at < GROUP * D;
        if (real) *reinterpret_cast<float4*>(y + column + at) = sum;
        const float4 quads[] = {sum};
        store_quantized(quads, real ? column + at : cols, cols, q8, meta);
    }
};

// Adds `n` ≤ MOST parts. By a block of at least GROUP·D/4 threads and GROUP warps, synchronized before: four elements a
// thread, and a head's weights are found by one warp, first of all by those that have no elements.
template <int D, int GROUP, int MOST, class Target>
__device__ __forceinline__ void combine(const float* parts, int n, float (*weights)[MOST], const Target target) {
    constexpr int kPart = part_floats(D, GROUP), kEach = (MOST + 31) / 32, kEarly = MOST < 16 ? MOST : 16;
    constexpr int kAdding = (GROUP * D / 4 + 31) / 32;  // warps
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, at = 4 * threadIdx.x;
    const int g = warp < kAdding ? warp - kAdding + blockDim.x / 32 : warp - kAdding;
    const bool real = at < GROUP * D;
    const auto quad = [=](int i) { return *reinterpret_cast<const float4*>(parts + i * kPart + at); };
    float2 ends[kEach];
    float4 early[kEarly];  // on their way while the weights are found
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
        const int i = lane + 32 * j;
        ends[j] = make_float2(-kInfinity, 0.f);
        if (g < GROUP && i < n) ends[j] = *reinterpret_cast<const float2*>(parts + i * kPart + GROUP * D + 2 * g);
    }
    if (warp < kAdding) {
#pragma unroll
        for (int i = 0; i < kEarly; ++i)
            if (real && i < n) early[i] = quad(i);
    }
    if (g < GROUP) {
        float peak = ends[0].x, total = 0.f;
#pragma unroll
        for (int j = 1; j < kEach; ++j) peak = fmaxf(peak, ends[j].x);
        peak = warp_max(peak);
#pragma unroll
        for (int j = 0; j < kEach; ++j) total = fmaf(exp2f(ends[j].x - peak), ends[j].y, total);
        total = warp_sum(total);
        const float scale = target.template end<D, GROUP>(g, peak, total);
#pragma unroll
        for (int j = 0; j < kEach; ++j)
            if (lane + 32 * j < n) weights[g][lane + 32 * j] = exp2f(ends[j].x - peak) * scale;
    }
    __syncthreads();
    if (warp >= kAdding) return;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    const auto add = [&](int i, const float4 v) {
        const float w = weights[at / D][i];
        sum.x = fmaf(w, v.x, sum.x), sum.y = fmaf(w, v.y, sum.y);
        sum.z = fmaf(w, v.z, sum.z), sum.w = fmaf(w, v.w, sum.w);
    };
    if (real) {
#pragma unroll
        for (int i = 0; i < kEarly; ++i)
            if (i < n) add(i, early[i]);
#pragma unroll 4
        for (int i = kEarly; i < (MOST > kEarly ? n : 0); ++i) add(i, quad(i));
    }
    target.template store<D, GROUP>(sum, at);
}
