// A warp's sums of a tile of products, and how the groups of warps that shared out its columns add theirs, in order.
#pragma once

template <int TOKENS>
using Accumulator = float[2][TOKENS / 8][4];  // 16 rows, 8 tokens, and a lane's four of these 128

// Adds the groups' parts in order; group g is left with the sums of its share of the tokens.
template <int ROWS, int DEPTHS, int TOKENS>
__device__ __forceinline__ void add_groups(float4* scratch, const Accumulator<TOKENS>& acc,
                                           Accumulator<TOKENS / DEPTHS>& sums) {
    constexpr int kThreads = 32 * ROWS, kTiles = TOKENS / 8, kShare = kTiles / DEPTHS;
    const int group = threadIdx.x / kThreads, thread = threadIdx.x % kThreads;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
        const float* a = acc[i / kTiles][i % kTiles];
        scratch[(group * 2 * kTiles + i) * kThreads + thread] = make_float4(a[0], a[1], a[2], a[3]);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2 * kShare; ++i) {
        const int at = i / kShare * kTiles + group * kShare + i % kShare;
        float* sum = sums[i / kShare][i % kShare];
#pragma unroll
        for (int g = 0; g < DEPTHS; ++g) {
            const float4 part = scratch[(g * 2 * kTiles + at) * kThreads + thread];
            sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
        }
    }
}
