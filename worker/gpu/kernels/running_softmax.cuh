// Online softmax of a warp's queries over one segment of positions, tile by tile, and the merge of
// segments.
//
// Base 2 (FlashAttention-2, Dao 2023): weights exp2(score - peak), their totals, their sums of
// values. Segments are merged by log-sum-exp, oldest first. Every product and sum that the compiler
// could contract is explicit, so the bits of a query are equal in every instantiation and wherever
// segments are merged. A stored state of one warp, a partial result, is partial_quads float4
// [..][32 lanes]; each float4 is stored and loaded by the same lane. Users: attention_prefill.cu,
// attention_wgmma.cu.
#pragma once
#include "attention_tiles.cuh"

constexpr float kLog2e = 1.4426950408889634f;

__host__ __device__ constexpr int partial_quads(int head_dim, int strips) { return 32 * strips * (head_dim / 8 + 1); }

template <int D, int STRIPS>
struct Softmax {
    static constexpr int kColumns = D / 8, kRows = 2 * STRIPS;
    Sums<D, STRIPS> sums;
    float peak[kRows], total[kRows];  // row lane/4 + 8·r; total: each of four lanes has a part

    __device__ __forceinline__ void reset() {
#pragma unroll
        for (int i = 0; i < STRIPS * kColumns * 4; ++i) sums[i / (4 * kColumns)][i / 4 % kColumns][i % 4] = 0.f;
#pragma unroll
        for (int r = 0; r < kRows; ++r) peak[r] = -kInfinity, total[r] = 0.f;
    }

    // Replace the scores of one tile by weights, and rescale sums and totals to the new peak.
    __device__ __forceinline__ void update(Scores<D, STRIPS>& scores, float scale) {
        float factors[kRows];
        if (weigh(scores, scale, factors)) rescale(factors);
    }

    // The part of `update` without the sums, which tensor cores may still add to. Returns whether
    // the warp must rescale them by `factors`. Peaks are kept unscaled; scaling rounds separately,
    // so an unchanged peak gives a factor of exactly one.
    __device__ __forceinline__ bool weigh(Scores<D, STRIPS>& scores, float scale, float (&factors)[kRows]) {
        constexpr int kScores = keys_per_tile(D) / 4, kChains = 4;
        float highest[kRows][kChains], base[kRows];  // the rows in turn: their chains overlap
        bool rises = false;
#pragma unroll
        for (int i = 0; i < kScores; ++i) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const float score = scores[r / 2][i / 2][r % 2 * 2 + i % 2];
                float& chain = highest[r][i % kChains];
                chain = fmaxf(i < kChains ? peak[r] : chain, score);
            }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r)
            highest[r][0] = fmaxf(fmaxf(highest[r][0], highest[r][1]), fmaxf(highest[r][2], highest[r][3]));
#pragma unroll
        for (int lanes = 1; lanes < 3; ++lanes) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) highest[r][1] = __shfl_xor_sync(0xffffffffu, highest[r][0], lanes);
#pragma unroll
            for (int r = 0; r < kRows; ++r) highest[r][0] = fmaxf(highest[r][0], highest[r][1]);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            base[r] = base_of(highest[r][0], scale);
            factors[r] = exp2f(__fsub_rn(__fmul_rn(peak[r], scale), base[r]));
            peak[r] = highest[r][0], rises |= factors[r] != 1.f;
            total[r] = __fmul_rn(total[r], factors[r]);
        }
#pragma unroll
        for (int i = 0; i < kScores; ++i) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                float& weight = scores[r / 2][i / 2][r % 2 * 2 + i % 2];
                weight = exp2f(fmaf(weight, scale, -base[r]));
                total[r] = __fadd_rn(total[r], weight);
            }
        }
        return __ballot_sync(0xffffffffu, rises);  // usually every factor is one
    }

    __device__ __forceinline__ void rescale(const float (&factors)[kRows]) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int i = 0; i < D / 4; ++i) {
                float& sum = sums[r / 2][i / 2][r % 2 * 2 + i % 2];
                sum = __fmul_rn(sum, factors[r]);
            }
        }
    }

    __device__ __forceinline__ void store(float4* partial) const {
        partial += threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < STRIPS; ++m, partial += 32 * (kColumns + 1)) {
            partial[0] = make_float4(peak[2 * m], peak[2 * m + 1], total[2 * m], total[2 * m + 1]);
#pragma unroll
            for (int n = 0; n < kColumns; ++n) {
                const float* sum = sums[m][n];
                partial[32 * (n + 1)] = make_float4(sum[0], sum[1], sum[2], sum[3]);
            }
        }
    }

    __device__ __forceinline__ void load(const float4* partial) {
        partial += threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < STRIPS; ++m, partial += 32 * (kColumns + 1)) {
            const float4 ends = partial[0];
            peak[2 * m] = ends.x, peak[2 * m + 1] = ends.y, total[2 * m] = ends.z, total[2 * m + 1] = ends.w;
#pragma unroll
            for (int n = 0; n < kColumns; ++n) {
                const float4 sum = partial[32 * (n + 1)];
                sums[m][n][0] = sum.x, sums[m][n][1] = sum.y, sums[m][n][2] = sum.z, sums[m][n][3] = sum.w;
            }
        }
    }

    // Merge the state of older positions into this one. An empty state has a factor of zero, the
    // other then of one.
    __device__ __forceinline__ void merge_older(const float4* older, float scale) {
        older += threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < STRIPS; ++m, older += 32 * (kColumns + 1)) {
            const float4 ends = older[0];
            float was[2], is[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float old_peak = r ? ends.y : ends.x, highest = fmaxf(old_peak, peak[2 * m + r]);
                const float base = base_of(highest, scale);
                was[r] = exp2f(__fsub_rn(__fmul_rn(old_peak, scale), base));
                is[r] = exp2f(__fsub_rn(__fmul_rn(peak[2 * m + r], scale), base));
                peak[2 * m + r] = highest;
                total[2 * m + r] = fmaf(r ? ends.w : ends.z, was[r], __fmul_rn(total[2 * m + r], is[r]));
            }
#pragma unroll
            for (int n = 0; n < kColumns; ++n) {
                const float4 old = older[32 * (n + 1)];
                float* sum = sums[m][n];
                sum[0] = fmaf(old.x, was[0], __fmul_rn(sum[0], is[0]));
                sum[1] = fmaf(old.y, was[0], __fmul_rn(sum[1], is[0]));
                sum[2] = fmaf(old.z, was[1], __fmul_rn(sum[2], is[1]));
                sum[3] = fmaf(old.w, was[1], __fmul_rn(sum[3], is[1]));
            }
        }
    }

private:
    // Zero while no key is visible: the weights are then zero.
    static __device__ __forceinline__ float base_of(float highest, float scale) {
        return highest == -kInfinity ? 0.f : __fmul_rn(highest, scale);
    }
};
