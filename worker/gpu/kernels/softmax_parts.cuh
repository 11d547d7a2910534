// Softmax-weighted sums that several warps or blocks found of different positions, and how they become one result.
//
// A part holds, of GROUP heads, sums [GROUP][D] of weights exp2(score - peak)·value, then (peak, total) [GROUP][2], and is
// 16-byte aligned. Parts are added by log-sum-exp in a fixed order (flash-decoding, Dao et al. 2023).
#pragma once
#include "quantized.cuh"
#include "warp.cuh"

constexpr int kMaxParts = 64;
constexpr float kLog2e = 1.4426950408889634f;

__host__ __device__ constexpr int part_floats(int head_dim, int group) { return (group * (head_dim + 2) + 3) / 4 * 4; }

struct Result {  // where the finished rows [GROUP][D] begin: at element `column` of a row of `cols`
    float* y;    // null: not finished
    u8* q8;
    Meta* meta;
    const float* sinks;
    int column, cols;
};

// Adds `n` parts, the first at parts[first] and on around `period` of them. With a result it ends the softmax, sinks
// included, and writes it; without, it leaves one such part at `out`. A block of at least GROUP·D/4 threads; ends
// synchronized.
template <int D, int GROUP>
__device__ void combine(const float* parts, int n, int first, int period, float (*weights)[kMaxParts], float* out,
                        const Result result) {
    constexpr int kPart = part_floats(D, GROUP), kEach = kMaxParts / 32, kEarly = 16;
    const int lane = threadIdx.x % 32, at = 4 * threadIdx.x;
    const bool real = at < GROUP * D;
    const auto part = [=](int i) { return parts + (first + i < period ? first + i : first + i - period) * kPart; };
    const auto quad = [=](int i) { return *reinterpret_cast<const float4*>(part(i) + at); };
    float4 early[kEarly];  // on their way while the weights are found
#pragma unroll
    for (int i = 0; i < kEarly; ++i)
        if (real && i < n) early[i] = quad(i);
    for (int g = threadIdx.x / 32; g < GROUP; g += blockDim.x / 32) {
        const float sink = result.y && result.sinks ? result.sinks[g] * kLog2e : -kInfinity;
        float2 ends[kEach];
        float peak = sink, total = 0.f;
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
            const int i = lane + 32 * j;
            ends[j] = make_float2(-kInfinity, 0.f);
            if (i < n) ends[j] = *reinterpret_cast<const float2*>(part(i) + GROUP * D + 2 * g);
            peak = fmaxf(peak, ends[j].x);
        }
        peak = warp_max(peak);
#pragma unroll
        for (int j = 0; j < kEach; ++j) total = fmaf(exp2f(ends[j].x - peak), ends[j].y, total);
        total = warp_sum(total);
        const float scale = result.y ? 1.f / (total + exp2f(sink - peak)) : 1.f;
#pragma unroll
        for (int j = 0; j < kEach; ++j)
            if (lane + 32 * j < n) weights[g][lane + 32 * j] = exp2f(ends[j].x - peak) * scale;
        if (!result.y && lane == 0) out[GROUP * D + 2 * g] = peak, out[GROUP * D + 2 * g + 1] = total;
    }
    __syncthreads();
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    if (real) {
        const auto add = [&](int i, const float4 v) {
            const float w = weights[at / D][i];
            sum.x = fmaf(w, v.x, sum.x), sum.y = fmaf(w, v.y, sum.y);
            sum.z = fmaf(w, v.z, sum.z), sum.w = fmaf(w, v.w, sum.w);
        };
#pragma unroll
        for (int i = 0; i < kEarly; ++i)
            if (i < n) add(i, early[i]);
#pragma unroll 8
        for (int i = kEarly; i < n; ++i) add(i, quad(i));
        *reinterpret_cast<float4*>((result.y ? result.y + result.column : out) + at) = sum;
    }
    if (result.y) store_quantized(sum, real ? result.column + at : result.cols, result.cols, result.q8, result.meta);
    __syncthreads();
}
