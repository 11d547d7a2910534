// A warp's queries and its rows of the result in prefill attention. Users: attention_prefill.cu,
// attention_wgmma.cu, which describe q, y and sinks.
#pragma once
#include "fragments.cuh"
#include "running_softmax.cuh"

template <int D, int STRIPS>
__device__ __forceinline__ void load_queries(Queries<D, STRIPS>& queries, const unsigned short* q, int row,
                                             int end, int head, int n_heads) {
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
#pragma unroll
        for (int i = 0; i < 4 * STRIPS; ++i) {  // A: {row, row + 8} × {columns 0–7, columns 8–15}
            const int t = row + i / 4 * 16 + i % 2 * 8, column = 16 * k + i / 2 % 2 * 8 + threadIdx.x % 4 * 2;
            const size_t at = ((size_t)t * n_heads + head) * D + column;
            queries[i / 4][k][i % 4] = t < end ? *reinterpret_cast<const unsigned int*>(q + at) : 0;
        }
    }
}

// Normalize the sums, sinks included, and write y. The FMA with +0 turns a sum of -0 into +0.
template <int D, int STRIPS>
__device__ __forceinline__ void write_rows(Softmax<D, STRIPS>& state, unsigned int* y, const float* sinks, float scale,
                                           int row, int end_row, int head, int n_heads) {
    const int lane = threadIdx.x % 32, end = padded(n_heads * D);
    const float sink = sinks ? __fmul_rn(sinks[head], kLog2e) : -kInfinity;
#pragma unroll
    for (int r = 0; r < 2 * STRIPS; ++r) {
        float total = state.total[r];
        total = __fadd_rn(total, __shfl_xor_sync(0xffffffffu, total, 1));
        total = __fadd_rn(total, __shfl_xor_sync(0xffffffffu, total, 2));
        const int t = row + 8 * r;
        if (t >= end_row) continue;
        const float high = __fmul_rn(state.peak[r], scale), top = fmaxf(high, sink);
        const float factor = exp2f(__fsub_rn(high, top));
        const float inverse = __fdiv_rn(factor, fmaf(total, factor, exp2f(__fsub_rn(sink, top))));
        unsigned int* out = y + (size_t)t * (end / 2);
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            const float* pair = &state.sums[r / 2][n][r % 2 * 2];
            const float lower = fmaf(pair[0], inverse, 0.f), upper = fmaf(pair[1], inverse, 0.f);
            out[fragment_index(head * D + 8 * n + lane % 4 * 2) / 2] = floats_to_half2(lower, upper);
        }
        for (int at = n_heads * D + lane % 4 * 2; head == n_heads - 1 && at < end; at += 8) out[fragment_index(at) / 2] = 0;
    }
}
