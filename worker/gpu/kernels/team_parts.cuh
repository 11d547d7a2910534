// Partial softmax results of a team of warps, in shared or device memory, and their combination.
//
// A part of GROUP heads holds sums of exp2(score - peak)·value, element e of head g at g·kRow + e,
// then (peak, total) [GROUP][2]. The rows are padded, so that the lanes of a warp store to all
// banks.
// The order of all sums is that of `combine` (softmax_parts.cuh): zeros of absent lanes add
// nothing.
// Users: attention_rows.cu, attention_few_rows.cu.
#pragma once
#include "decode_heads.cuh"
#include "decode_splits.cuh"

__host__ __device__ constexpr int part_row_floats(int head_dim) { return head_dim + 8; }
__host__ __device__ constexpr int part_floats(int head_dim, int group) {
    return (group * (part_row_floats(head_dim) + 2) + 3) / 4 * 4;
}

template <int D, int GROUP>
struct Parts {
    static constexpr int kRow = part_row_floats(D), kFloats = part_floats(D, GROUP), kEnds = GROUP * kRow;

    // Store the state of a warp, whose tile j of sums is elements 8j … 8j + 7, as the part at `to`.
    __device__ __forceinline__ static void store(Heads<D, F16Kv>& heads, float* to) {
        const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
        float total = __fadd_rn(heads.total, __shfl_xor_sync(0xffffffffu, heads.total, 1));
        total = __fadd_rn(total, __shfl_xor_sync(0xffffffffu, total, 2));
        if (g >= GROUP) return;
#pragma unroll
        for (int j = 0; j < Heads<D, F16Kv>::kTiles; ++j) {
            const float* sums = heads.sums[j];
            *reinterpret_cast<float2*>(to + g * kRow + 8 * j + 2 * c) =
                make_float2(__fadd_rn(sums[0], sums[2]), __fadd_rn(sums[1], sums[3]));
        }
        if (c == 0) *reinterpret_cast<float2*>(to + kEnds + 2 * g) = make_float2(heads.peak, total);
    }

    // Add `n` ≤ MAX parts to the final rows, or to the part `out` if that is not null. Called by
    // all threads of a synchronized block.
    template <int MAX>
    __device__ __forceinline__ static void combine(const float* parts, int n, float (*weights)[MAX],
                                                   const FinalRows& rows, float* out) {
        constexpr int kFew = warps_of(D, GROUP);
        if (n <= kFew) weigh<kFew>(parts, n, weights, rows, out);
        else weigh<32>(parts, n, weights, rows, out);
        __syncthreads();
#pragma unroll 1
        for (int from = threadIdx.x / 32 * 128; from < GROUP * D; from += 4 * blockDim.x) {
            const int at = from + 4 * (threadIdx.x % 32), g = min(at / D, GROUP - 1), offset = g * kRow + at % D;
            float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
            for (int i = 0; i < n; ++i) {
                const float4 v = *reinterpret_cast<const float4*>(parts + i * kFloats + offset);
                const float w = weights[g][i];
                sum.x = fmaf(w, v.x, sum.x), sum.y = fmaf(w, v.y, sum.y);
                sum.z = fmaf(w, v.z, sum.z), sum.w = fmaf(w, v.w, sum.w);
            }
            if (!out) rows.template store<D, GROUP>(sum, at);
            else if (at < GROUP * D) *reinterpret_cast<float4*>(out + offset) = sum;
        }
    }

private:
    // The weights of the parts, and (peak, total) of all. LANES of a head, with two parts each if
    // 32.
    template <int LANES, int MAX>
    __device__ __forceinline__ static void weigh(const float* parts, int n, float (*weights)[MAX],
                                                 const FinalRows& rows, float* out) {
        constexpr bool kTwo = LANES == 32;
        static_assert(MAX <= 64, "two parts a lane");
#pragma unroll 1
        for (int first = 0; first < GROUP; first += blockDim.x / LANES) {
            const int g = first + threadIdx.x / LANES, i = threadIdx.x % LANES;
            const auto end_of = [=](int i) {
                return g < GROUP && i < n ? *reinterpret_cast<const float2*>(parts + i * kFloats + kEnds + 2 * g)
                                          : make_float2(-kInfinity, 0.f);
            };
            const float2 a = end_of(i), b = kTwo ? end_of(i + 32) : make_float2(-kInfinity, 0.f);
            float peak = fmaxf(a.x, b.x);
#pragma unroll
            for (int by = LANES / 2; by; by /= 2) peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, by));
            const float factor = exp2f(__fsub_rn(a.x, peak)), factor_b = kTwo ? exp2f(__fsub_rn(b.x, peak)) : 0.f;
            float total = fmaf(factor, a.y, 0.f);
            if (kTwo) total = fmaf(factor_b, b.y, total);
            total = warp_sum<LANES>(total);
            if (g >= GROUP) continue;
            float scale = 1.f;
            if (!out) scale = rows.template end<D, GROUP>(g, peak, total);
            else if (i == 0) *reinterpret_cast<float2*>(out + kEnds + 2 * g) = make_float2(peak, total);
            if (i < n) weights[g][i] = factor * scale;
            if (kTwo && i + 32 < n) weights[g][i + 32] = factor_b * scale;
        }
    }
};
