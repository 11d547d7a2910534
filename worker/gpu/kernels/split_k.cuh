// Sum of the K splits of a matmul tile: in two halves, each in ascending order, then the halves.
//
// A tile's columns are cut into SPLIT_K·PASSES splits. SPLIT_K warps work side by side along K;
// each computes PASSES splits one after another, warp k the splits k·PASSES to k·PASSES + PASSES -
// 1. The order of a sum depends on SPLIT_K·PASSES only: four warps with one pass and two warps with
// two passes give the same bits. With PASSES > 1, SPLIT_K is 2: a half each.
#pragma once

// A warp's accumulators: FRAGS_M fragments of 16 rows, TILE_N/8 fragments of 8 tokens, and a lane's
// four of these 128 elements.
template <int FRAGS_M, int TILE_N>
using Accumulator = float[FRAGS_M][TILE_N / 8][4];

// Add the saved sum of the earlier passes to acc; before another pass, save the result and zero
// acc. The values of a lane in `saved` are STRIDE apart.
template <int PASSES, int STRIDE, int FRAGS_M, int FRAGS_N>
__device__ __forceinline__ void carry_pass(float4* saved, int pass, float (&acc)[FRAGS_M][FRAGS_N][4]) {
#pragma unroll
    for (int i = 0; i < FRAGS_M * FRAGS_N; ++i) {
        float* a = acc[i / FRAGS_N][i % FRAGS_N];
        if (pass > 0) {
            const float4 before = saved[i * STRIDE];
            a[0] = before.x + a[0], a[1] = before.y + a[1], a[2] = before.z + a[2], a[3] = before.w + a[3];
        }
        if (pass == PASSES - 1) continue;
        saved[i * STRIDE] = make_float4(a[0], a[1], a[2], a[3]);
        a[0] = a[1] = a[2] = a[3] = 0.f;
    }
}

// Tokens whose sums one of the SPLIT_K warps reduces: at least 8, so that some warps may have none.
__host__ __device__ constexpr int reduced_tokens(int tile_n, int split_k) {
    return tile_n / split_k < 8 ? 8 : tile_n / split_k;
}

// Reduce the accumulators of the SPLIT_K warps; warp k returns in `sums` those of its REDUCED_N
// tokens, if it has any.
template <int WARPS_M, int SPLIT_K, int FRAGS_M, int TILE_N, int REDUCED_N>
__device__ __forceinline__ void reduce_splits(float4* scratch, const Accumulator<FRAGS_M, TILE_N>& acc,
                                              Accumulator<FRAGS_M, REDUCED_N>& sums) {
    constexpr int kThreads = 32 * WARPS_M, kFragsN = TILE_N / 8, kReduced = REDUCED_N / 8;
    const int k = threadIdx.x / kThreads, thread = threadIdx.x % kThreads;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < FRAGS_M * kFragsN; ++i) {
        const float* a = acc[i / kFragsN][i % kFragsN];
        scratch[(k * FRAGS_M * kFragsN + i) * kThreads + thread] = make_float4(a[0], a[1], a[2], a[3]);
    }
    __syncthreads();
    if (k * kReduced >= kFragsN) return;
#pragma unroll
    for (int i = 0; i < FRAGS_M * kReduced; ++i) {
        const int at = i / kReduced * kFragsN + k * kReduced + i % kReduced;
        float half[2][4];
#pragma unroll
        for (int s = 0; s < SPLIT_K; ++s) {
            const float4 split = scratch[(s * FRAGS_M * kFragsN + at) * kThreads + thread];
            float* h = half[s / (SPLIT_K / 2)];
            const bool first = s % (SPLIT_K / 2) == 0;
            h[0] = first ? split.x : h[0] + split.x, h[1] = first ? split.y : h[1] + split.y;
            h[2] = first ? split.z : h[2] + split.z, h[3] = first ? split.w : h[3] + split.w;
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i / kReduced][i % kReduced][j] = half[0][j] + half[1][j];
    }
}
