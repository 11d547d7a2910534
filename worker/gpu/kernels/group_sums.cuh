// How the sums of a product's groups of columns come together: in two halves, each of them in order. So warps side by side
// and warps that take turns get the same bits: depth d takes groups d·TURNS to d·TURNS + TURNS - 1, and two depths have
// half of them each where there are turns.
#pragma once

template <int STRIPS, int TOKENS>
using Accumulator = float[STRIPS][TOKENS / 8][4];  // 16 rows, 8 tokens, and a lane's four of these 128

// Adds what this lane kept of the turns before, and keeps the sum for those to come, which begin at 0. kept is
// a lane's own, `APART` apart.
template <int TURNS, int APART, int STRIPS, int TILES>
__device__ __forceinline__ void keep(float4* kept, int turn, float (&acc)[STRIPS][TILES][4]) {
#pragma unroll
    for (int i = 0; i < STRIPS * TILES; ++i) {
        float* a = acc[i / TILES][i % TILES];
        if (turn > 0) {
            const float4 before = kept[i * APART];
            a[0] = before.x + a[0], a[1] = before.y + a[1], a[2] = before.z + a[2], a[3] = before.w + a[3];
        }
        if (turn == TURNS - 1) continue;
        kept[i * APART] = make_float4(a[0], a[1], a[2], a[3]);
        a[0] = a[1] = a[2] = a[3] = 0.f;
    }
}

// Tokens whose sums a depth adds: the first ones have 8 at least.
__host__ __device__ constexpr int share_of(int tokens, int depths) { return tokens / depths < 8 ? 8 : tokens / depths; }

// Adds the depths' parts; depth d is left with the sums of its share of the tokens, if there are any.
template <int ROWS, int DEPTHS, int STRIPS, int TOKENS, int SHARE>
__device__ __forceinline__ void add_depths(float4* scratch, const Accumulator<STRIPS, TOKENS>& acc,
                                           Accumulator<STRIPS, SHARE>& sums) {
    constexpr int kThreads = 32 * ROWS, kTiles = TOKENS / 8, kShare = SHARE / 8;
    const int depth = threadIdx.x / kThreads, thread = threadIdx.x % kThreads;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < STRIPS * kTiles; ++i) {
        const float* a = acc[i / kTiles][i % kTiles];
        scratch[(depth * STRIPS * kTiles + i) * kThreads + thread] = make_float4(a[0], a[1], a[2], a[3]);
    }
    __syncthreads();
    if (depth * kShare >= kTiles) return;
#pragma unroll
    for (int i = 0; i < STRIPS * kShare; ++i) {
        const int at = i / kShare * kTiles + depth * kShare + i % kShare;
        float half[2][4];
#pragma unroll
        for (int d = 0; d < DEPTHS; ++d) {
            const float4 part = scratch[(d * STRIPS * kTiles + at) * kThreads + thread];
            float* h = half[d / (DEPTHS / 2)];
            const bool first = d % (DEPTHS / 2) == 0;
            h[0] = first ? part.x : h[0] + part.x, h[1] = first ? part.y : h[1] + part.y;
            h[2] = first ? part.z : h[2] + part.z, h[3] = first ? part.w : h[3] + part.w;
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i / kShare][i % kShare][j] = half[0][j] + half[1][j];
    }
}
