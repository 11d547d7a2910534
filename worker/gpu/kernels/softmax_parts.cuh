// Partial softmax results of decode attention, over disjoint positions, and their combination.
//
// A partial result of GROUP heads holds sums [GROUP][D] of exp2(score - peak)·value, then (peak,
// total) [GROUP][2]; it is 16-byte aligned. `combine` adds partial results by log-sum-exp in a
// fixed order (flash-decoding, Dao et al. 2023) into a target: one further partial result, or the
// final rows.
// Users: attention_decode.cu; FinalRows: attention_rows.cu, attention_few_rows.cu.
#pragma once
#include "q8_tiles.cuh"
#include "warp.cuh"

constexpr float kLog2e = 1.4426950408889634f;

__host__ __device__ constexpr int partial_floats(int head_dim, int group) {
    return (group * (head_dim + 2) + 3) / 4 * 4;
}

struct Partial {  // target: a partial result at `out`
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

// Target: the normalized rows [GROUP][D], from element `column` of a row of `cols` on, as f32 and
// as Q8: row `row` of tiles, or, if they are null, the blocks at q8 and meta.
struct FinalRows {
    float* y;
    u8* q8;
    Meta* meta;
    const float* sinks;  // [GROUP] or null
    int column, cols;
    Q8Tiles tiles;
    int row;
    template <int D, int GROUP>
    __device__ __forceinline__ float end(int g, float peak, float total) const {
        return 1.f / (sinks ? __fadd_rn(total, exp2f(fmaf(sinks[g], kLog2e, -peak))) : total);
    }
    template <int D, int GROUP>
    __device__ __forceinline__ void store(const float4 sum, int at) const {
        const bool real = at < GROUP * D;
        const float4 quads[] = {sum};
        const Q8Quads<1> v(quads, real);
        if (!real) return;
        *reinterpret_cast<float4*>(y + column + at) = sum;
        store_q8(v.packed[0], column + at, v.scale, v.low, v.high);
    }
    // Zeros instead, for an inactive row. Called by all threads of a block.
    template <int D, int GROUP>
    __device__ __forceinline__ void store_zeros() const {
#pragma unroll 1
        for (int at = column + 4 * threadIdx.x; at < column + GROUP * D; at += 4 * blockDim.x) {
            *reinterpret_cast<float4*>(y + at) = make_float4(0.f, 0.f, 0.f, 0.f);
            store_q8(0, at, 0.f, 0, 0);
        }
    }

private:
    __device__ __forceinline__ void store_q8(u32 packed, int at, float scale, int low, int high) const {
        if (tiles.q) {
            tiles.store_quad(packed, row, at);
            if (at % 32 == 0) tiles.store_meta(row, at / 32, scale, low, high);
        } else {
            *reinterpret_cast<u32*>(q8 + at % 32 / 16 * (cols / 2) + at / 32 * 16 + at % 16) = packed;
            if (at % 32 == 0) meta[at / 32] = {scale, {(short)low, (short)high}};
        }
    }
};

// Add `n` ≤ MAX partial results. Call from all threads of a synchronized block of at least
// GROUP·D/4 threads and GROUP warps: four elements a thread; one warp computes the weights of one
// head, preferably a warp without elements.
template <int D, int GROUP, int MAX, class Target>
__device__ __forceinline__ void combine(const float* partials, int n, float (*weights)[MAX], const Target target) {
    constexpr int kPartial = partial_floats(D, GROUP), kEach = (MAX + 31) / 32, kFirst = MAX < 16 ? MAX : 16;
    constexpr int kAdding = (GROUP * D / 4 + 31) / 32;  // warps
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, at = 4 * threadIdx.x;
    const int g = warp < kAdding ? warp - kAdding + blockDim.x / 32 : warp - kAdding;
    const bool real = at < GROUP * D;
    const auto quad = [=](int i) { return *reinterpret_cast<const float4*>(partials + i * kPartial + at); };
    float2 ends[kEach];
    float4 first[kFirst];  // loaded while the weights are computed
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
        const int i = lane + 32 * j;
        ends[j] = make_float2(-kInfinity, 0.f);
        if (g < GROUP && i < n) ends[j] = *reinterpret_cast<const float2*>(partials + i * kPartial + GROUP * D + 2 * g);
    }
    if (warp < kAdding) {
#pragma unroll
        for (int i = 0; i < kFirst; ++i)
            if (real && i < n) first[i] = quad(i);
    }
    if (g < GROUP) {
        float peak = ends[0].x, total = 0.f;
#pragma unroll
        for (int j = 1; j < kEach; ++j) peak = fmaxf(peak, ends[j].x);
        peak = warp_max(peak);
#pragma unroll
        for (int j = 0; j < kEach; ++j) total = fmaf(exp2f(__fsub_rn(ends[j].x, peak)), ends[j].y, total);
        total = warp_sum(total);
        const float scale = target.template end<D, GROUP>(g, peak, total);
#pragma unroll
        for (int j = 0; j < kEach; ++j)
            if (lane + 32 * j < n) weights[g][lane + 32 * j] = exp2f(__fsub_rn(ends[j].x, peak)) * scale;
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
        for (int i = 0; i < kFirst; ++i)
            if (i < n) add(i, first[i]);
#pragma unroll 4
        for (int i = kFirst; i < (MAX > kFirst ? n : 0); ++i) add(i, quad(i));
    }
    target.template store<D, GROUP>(sum, at);
}
