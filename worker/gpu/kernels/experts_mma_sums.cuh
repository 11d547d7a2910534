// Sums of a stage of an experts' product on the int8 tensor cores: those of the warps, which share
// K, in shared memory; their totals and the results of a chunk.
#pragma once
#include "experts_mma_stages.cuh"

// A lane's sums of 16 rows and 8·NT pairs: element i of group n is that of row l/4 + 8·(i/2) and
// pair 8·n + l%4·2 + i%2.
template <int NT>
using LaneSums = float[NT][4];

// v[0] = the sum of v: elements N/2 apart first.
template <int N>
__device__ __forceinline__ void add_halves(float (&v)[N]) {
    if constexpr (N > 1) {
        float sums[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; ++i) sums[i] = __fadd_rn(v[i], v[i + N / 2]);
        add_halves(sums);
        v[0] = sums[0];
    }
}

// Sums of all slices, [slice][groups][lane][4], for `groups` groups of 8 pairs. Slice w has those
// of chains w and w + 16 of the butterfly over 32 chains.
struct Partials {
    float4* at;
    int groups;
    template <int NT>
    __device__ __forceinline__ void store(int slice, const LaneSums<NT>& v) const {
        float4* const to = at + slice * (32 * NT) + threadIdx.x % 32;
#pragma unroll
        for (int n = 0; n < NT; ++n) to[32 * n] = make_float4(v[n][0], v[n][1], v[n][2], v[n][3]);
    }
    // The lane's totals of group n, in the order of the butterfly: bits 8, 4, 2 and 1.
    __device__ __forceinline__ void total(int n, float (&sum)[4]) const {
        const float4* const from = at + 32 * n + threadIdx.x % 32;
        float v[4][kSlices / 2];
#pragma unroll
        for (int w = 0; w < kSlices / 2; ++w) {
            const float4 f = from[w * 32 * groups], g = from[(w + kSlices / 2) * 32 * groups];
            v[0][w] = __fadd_rn(f.x, g.x), v[1][w] = __fadd_rn(f.y, g.y);
            v[2][w] = __fadd_rn(f.z, g.z), v[3][w] = __fadd_rn(f.w, g.w);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) add_halves(v[i]), sum[i] = v[i][0];
    }
};

// The two pairs of a group of which a lane has totals: their numbers (-1: none), and the factor of
// the input's row or the pair's weight.
struct LanePairs {
    int pair[2];
    float factor[2];
    template <int MAX_NT>
    __device__ __forceinline__ void load(const TilePairs<MAX_NT>& pairs, int group, int count) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int t = 8 * group + threadIdx.x % 4 * 2 + j;
            pair[j] = t < count ? pairs.pair[t] : -1, factor[j] = t < count ? pairs.factor[t] : 0.f;
        }
    }
};

// A lane's totals of a chunk, and the biases of their rows: of gate and up, or of rows l/4 and l/4
// + 8 of down.
template <bool GATED>
struct LaneTotals {
    float sums[kStages<GATED>][4], biases[kStages<GATED>][2];

    __device__ __forceinline__ void load_biases(const PairProduct& p, int expert, int chunk) {
#pragma unroll
        for (int stage = 0; stage < kStages<GATED>; ++stage) {
            const size_t row = (size_t)expert * p.rows + kChunk * chunk + first_row(stage);
            biases[stage][0] = p.bias[0] ? __ldg(p.bias[0] + row) : 0.f;
            biases[stage][1] = p.bias[GATED] ? __ldg(p.bias[GATED] + row + (GATED ? 0 : 8)) : 0.f;
        }
    }
    __device__ __forceinline__ void write(const PairProduct& p, int chunk, const LanePairs& pairs) const {
        if constexpr (GATED) write_hidden(p, chunk, pairs);
        else write_weighted(p, chunk, pairs);
    }

private:
    static __device__ __forceinline__ int first_row(int stage) {
        return (GATED ? 8 : kStageRows) * stage + threadIdx.x % 32 / 4;
    }
    __device__ __forceinline__ void write_weighted(const PairProduct& p, int chunk, const LanePairs& pairs) const {
#pragma unroll
        for (int stage = 0; stage < kStages<GATED>; ++stage)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (pairs.pair[i % 2] >= 0)
                    store_weighted(p, pairs.pair[i % 2], kChunk * chunk + first_row(stage) + i / 2 * 8, sums[stage][i],
                                   pairs.factor[i % 2], biases[stage][i / 2]);
    }
    // h, and its Q8 blocks (q8_activations.cuh): a chunk is a block for each pair.
    __device__ __forceinline__ void write_hidden(const PairProduct& p, int chunk, const LanePairs& pairs) const {
        constexpr u32 kAll = 0xffffffff;
        constexpr int kParts = kStages<GATED>;
        const int element = threadIdx.x % 32 / 4;  // of the 8 of a stage
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const bool valid = pairs.pair[j] >= 0;
            const size_t pair = max(pairs.pair[j], 0);
            float h[kParts], amax = 0.f;
#pragma unroll
            for (int s = 0; s < kParts; ++s) {
                h[s] = gated(__fmaf_rn(sums[s][j], pairs.factor[j], biases[s][0]),
                             __fmaf_rn(sums[s][2 + j], pairs.factor[j], biases[s][1]), p.gate);
                if (valid) p.out[pair * p.rows + kChunk * chunk + first_row(s)] = h[s];
                amax = fmaxf(amax, fabsf(h[s]));
            }
            if (!p.out_q) continue;
#pragma unroll
            for (int lane = 4; lane < 32; lane *= 2) amax = fmaxf(amax, __shfl_xor_sync(kAll, amax, lane));
            const bool nonzero = amax >= kSmallestAmax;
            const float inverse = nonzero ? __fdiv_rn(127.f, amax) : 0.f;
            u8* const q = p.out_q + pair * p.rows + 16 * chunk + element;
            int sum[2] = {};  // over elements 0-15 and 16-31
#pragma unroll
            for (int s = 0; s < kParts; ++s) {
                const int code = __float2int_rn(__fmul_rn(h[s], inverse));
                sum[s / 2] += code;
                if (valid) q[s / 2 * (p.rows / 2) + s % 2 * 8] = (u8)code;
            }
#pragma unroll
            for (int lane = 4; lane < 32; lane *= 2)
                sum[0] += __shfl_xor_sync(kAll, sum[0], lane), sum[1] += __shfl_xor_sync(kAll, sum[1], lane);
            if (!valid || element != 0) continue;
            const float scale = nonzero ? __fdiv_rn(amax, 127.f) : 0.f;
            p.out_meta[pair * (p.rows / 32) + chunk] = {scale, {(short)sum[0], (short)sum[1]}};
        }
    }
};
