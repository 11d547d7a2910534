// The softmax of a warp's queries over one segment of positions, tile by tile, and how segments become one.
//
// Online softmax in base 2 (FlashAttention-2, Dao 2023): weights exp2(score - peak), their totals, their sums of values.
// Segments are merged by log-sum-exp from the oldest on. Every product and sum that the compiler could contract is
// written out, so a query's bits are the same in every instantiation and wherever its segments meet. A part, one warp's
// state in memory, is part_quads float4 [..][32 lanes]; only the lane that left a quad reads it.
#pragma once
#include "attention_tiles.cuh"

constexpr float kLog2e = 1.4426950408889634f;

__host__ __device__ constexpr int part_quads(int head_dim, int strips) { return 32 * strips * (head_dim / 8 + 1); }

template <int D, int STRIPS>
struct Softmax {
    static constexpr int kColumns = D / 8, kRows = 2 * STRIPS;
    Sums<D, STRIPS> sums;
    float peak[kRows], total[kRows];  // of rows lane/4 and 8, 16, 24 after it; a quad's lanes have each a share of total

    __device__ __forceinline__ void begin() {
#pragma unroll
        for (int i = 0; i < STRIPS * kColumns * 4; ++i) sums[i / (4 * kColumns)][i / 4 % kColumns][i % 4] = 0.f;
#pragma unroll
        for (int r = 0; r < kRows; ++r) peak[r] = -kInfinity, total[r] = 0.f;
    }

    // One tile's step: scores become weights, sums and totals are brought to the new peak. Peaks are unscaled; they are
    // scaled with a rounding of its own, so that an old peak's distance from itself is zero.
    __device__ __forceinline__ void soften(Scores<D, STRIPS>& scores, float scale) {
        constexpr int kScores = keys_per_tile(D) / 4;
        float factors[kRows];
        bool rises = false;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            float highest = peak[r];
#pragma unroll
            for (int i = 0; i < kScores; ++i) highest = fmaxf(highest, scores[r / 2][i / 2][r % 2 * 2 + i % 2]);
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
            const float base = base_of(highest, scale), factor = exp2f(__fmul_rn(peak[r], scale) - base);
            peak[r] = highest, factors[r] = factor, rises |= factor != 1.f;
            total[r] = __fmul_rn(total[r], factor);
#pragma unroll
            for (int i = 0; i < kScores; ++i) {
                float& weight = scores[r / 2][i / 2][r % 2 * 2 + i % 2];
                weight = exp2f(fmaf(weight, scale, -base));
                total[r] = __fadd_rn(total[r], weight);
            }
        }
        if (!__ballot_sync(0xffffffffu, rises)) return;  // as mostly: what is multiplied by one stays
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int i = 0; i < D / 4; ++i) {
                float& sum = sums[r / 2][i / 2][r % 2 * 2 + i % 2];
                sum = __fmul_rn(sum, factors[r]);
            }
        }
    }

    __device__ __forceinline__ void leave(float4* part) const {
        part += threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < STRIPS; ++m, part += 32 * (kColumns + 1)) {
            part[0] = make_float4(peak[2 * m], peak[2 * m + 1], total[2 * m], total[2 * m + 1]);
#pragma unroll
            for (int n = 0; n < kColumns; ++n) {
                const float* sum = sums[m][n];
                part[32 * (n + 1)] = make_float4(sum[0], sum[1], sum[2], sum[3]);
            }
        }
    }

    __device__ __forceinline__ void take(const float4* part) {
        part += threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < STRIPS; ++m, part += 32 * (kColumns + 1)) {
            const float4 ends = part[0];
            peak[2 * m] = ends.x, peak[2 * m + 1] = ends.y, total[2 * m] = ends.z, total[2 * m + 1] = ends.w;
#pragma unroll
            for (int n = 0; n < kColumns; ++n) {
                const float4 sum = part[32 * (n + 1)];
                sums[m][n][0] = sum.x, sums[m][n][1] = sum.y, sums[m][n][2] = sum.z, sums[m][n][3] = sum.w;
            }
        }
    }

    // The state becomes `older`, followed by what it was. What is empty has a factor of zero, and the other then of one.
    __device__ __forceinline__ void follow(const float4* older, float scale) {
        older += threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < STRIPS; ++m, older += 32 * (kColumns + 1)) {
            const float4 ends = older[0];
            float was[2], is[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float old_peak = r ? ends.y : ends.x, highest = fmaxf(old_peak, peak[2 * m + r]);
                const float base = base_of(highest, scale);
                was[r] = exp2f(__fmul_rn(old_peak, scale) - base);
                is[r] = exp2f(__fmul_rn(peak[2 * m + r], scale) - base);
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
    // None seen yet: weights are zero.
    static __device__ __forceinline__ float base_of(float highest, float scale) {
        return highest == -kInfinity ? 0.f : __fmul_rn(highest, scale);
    }
};
