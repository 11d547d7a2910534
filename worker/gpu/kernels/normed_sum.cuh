// RMSNorm of a product's result y and its addition to the residual stream, by a block for a row.
//
//   x = (residual + y / sqrt(mean(y²) + eps) · weight) · scale   (arXiv:1910.07467)
// Order and rounding: of the first NORM_THREADS threads each adds its float4 (sum_of_squares)
// ascending, NORM_THREADS apart, then the warp's butterfly, then warps ascending; as in the twin, the
// factor 1/sqrt is rounded twice, each product and sum once.
// Twin: `linear_norm_add` in worker/cpu/ops.py. Users: norm_add.cu; matvec.cu and glu.cu, whose kernels
// take `NormedSum` as an optional last parameter and store x.
#pragma once
#include "warp.cuh"

// 1/rms of a row of `cols` elements from the squares that each thread has added. Called by all threads
// of the block; has a barrier.
__device__ __forceinline__ float norm_factor(float squares, int cols, float eps) {
    constexpr int kWarps = NORM_THREADS / 32;
    __shared__ float warp_squares[kWarps];
    squares = warp_sum(squares);
    if (threadIdx.x < NORM_THREADS && threadIdx.x % 32 == 0) warp_squares[threadIdx.x / 32] = squares;
    __syncthreads();
    squares = 0.f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) squares = __fadd_rn(squares, warp_squares[i]);
    return __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(squares, (float)cols), eps)));
}

__device__ __forceinline__ float4 add_normed(float4 residual, float4 y, float factor, float4 weight) {
    const auto add = [=](float residual, float y, float weight) {
        return __fadd_rn(residual, __fmul_rn(__fmul_rn(y, factor), weight));
    };
    return make_float4(add(residual.x, y.x, weight.x), add(residual.y, y.y, weight.y), add(residual.z, y.z, weight.z),
                       add(residual.w, y.w, weight.w));
}

__device__ __forceinline__ float4 scaled(float4 x, float scale) {
    return make_float4(__fmul_rn(x.x, scale), __fmul_rn(x.y, scale), __fmul_rn(x.z, scale), __fmul_rn(x.w, scale));
}

// The input row of a product: every block computes it, the first one stores it. 16-byte alignment.
struct NormedSum {
    const float4 *y, *weight, *residual;  // [cols] f32
    float4* x;                            // [cols] f32
    float eps, scale;

    // Called by all threads, after the wait; has a barrier.
    __device__ __forceinline__ float factor(int cols) const {
        constexpr int kAtOnce = 4;
        float squares = 0.f;
        if (threadIdx.x < NORM_THREADS) {
#pragma unroll 1
            for (int from = threadIdx.x; from < cols / 4; from += kAtOnce * NORM_THREADS) {
                float4 v[kAtOnce];
#pragma unroll
                for (int j = 0; j < kAtOnce; ++j) {
                    v[j] = make_float4(0.f, 0.f, 0.f, 0.f);
                    if (from + j * NORM_THREADS < cols / 4) v[j] = y[from + j * NORM_THREADS];
                }
#pragma unroll
                for (int j = 0; j < kAtOnce; ++j) squares = __fadd_rn(squares, sum_of_squares(v[j]));
            }
        }
        return norm_factor(squares, cols, eps);
    }
    // Elements 8i … 8i + 7 of x.
    __device__ __forceinline__ void load(float4 (&v)[2], int i, float factor) const {
#pragma unroll
        for (int j = 0; j < 2; ++j)
            v[j] = scaled(add_normed(residual[2 * i + j], y[2 * i + j], factor, weight[2 * i + j]), scale);
        if (blockIdx.x == 0) x[2 * i] = v[0], x[2 * i + 1] = v[1];
    }
};
