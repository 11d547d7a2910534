// Staging of a decode product's input in shared memory, in the forms that its weights need: Q8
// blocks, f32, or both.
//
// Input rows are Q8 blocks where their producer stored them (gated FFN, attention); f32 rows are
// quantized here, by each block of the grid for itself: rows are short, they are in L2, and no
// further launch is needed. Of an RMSNorm
//     n = x / sqrt(mean(x²) + eps) · weight   (Zhang and Sennrich 2019, arXiv:1910.07467)
// x·weight is staged. 1/sqrt(…) is one factor for the row, applied to the sums of the product, so
// that staging does not depend on it. Sums have a fixed order, with every contraction written out.
// Twins: `rms_norm` in worker/cpu/plain.py, `quantize` in tests/quantized_ops.py.
#pragma once
#include "q8_activations.cuh"
#include "warp.cuh"

constexpr int kWarps = DECODE_WARPS, kThreads = 32 * kWarps;

// Rows in global memory: x [T, cols] f32, or q and meta (q8_activations.cuh), or both; norm [cols]
// f32 or null.
struct InputRows {
    const float* x;
    const u8* q;
    const Meta* meta;
    const float* norm;
    float eps;
    int cols;
};

// Rows in shared memory.
struct StagedRows {
    const u8* q;
    const Meta* meta;
    const float* x;
    int cols;
    __device__ __forceinline__ StagedRows row(int t) const {
        return {q + t * cols, meta + t * (cols / 32), x + t * cols, cols};
    }
};

// Prefetch the norm's weights to L2, a line of 128 bytes a thread: they were last read one step
// ago.
__device__ __forceinline__ void prefetch_norm(const InputRows& rows) {
    if (!rows.norm) return;
#pragma unroll 1
    for (int i = 32 * threadIdx.x; i < rows.cols; i += 32 * blockDim.x)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(rows.norm + i));
}

// Stage rows [first, first + count) as Q8 blocks, as f32, or as both, and return the factor for the
// sums of the product. Called by all WARPS warps of the block; ends with a barrier. `shared` is
// 16-byte aligned and holds count·cols·(4·STAGE_F32 + 1.25·STAGE_Q8) bytes. With a norm, count must
// be 1: weights are indexed by column and the factor is one row's.
template <bool STAGE_Q8, bool STAGE_F32, int WARPS = kWarps>
__device__ __forceinline__ float stage(const InputRows& rows, int first, int count, u8* shared, StagedRows& staged) {
    constexpr int kThreads = 32 * WARPS;
    __shared__ float warp_squares[WARPS];
    const int cols = rows.cols, elements = count * cols, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* plain = reinterpret_cast<float*>(shared);
    u8* q = shared + (STAGE_F32 ? 4 * elements : 0);
    Meta* meta = reinterpret_cast<Meta*>(q + elements);
    staged = {q, meta, plain, cols};
    const bool quantize = STAGE_Q8 && !rows.q;
    if (STAGE_F32 || quantize) {
        const float4* x = reinterpret_cast<const float4*>(rows.x + (size_t)first * cols);
        const float4* weight = reinterpret_cast<const float4*>(rows.norm);
        float squares = 0.f;
#pragma unroll 1
        for (int base = 64 * warp; base < elements / 4; base += 2 * kThreads) {  // whole warps, for store_quantized
            const int i = base + 2 * lane;
            float4 v[2] = {};
            if (i < elements / 4) {
                v[0] = x[i], v[1] = x[i + 1];
                if (weight) {
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        const float4 w = __ldg(weight + i + j);
                        squares = __fadd_rn(squares, sum_of_squares(v[j]));
                        v[j] = make_float4(v[j].x * w.x, v[j].y * w.y, v[j].z * w.z, v[j].w * w.w);
                    }
                }
                if (STAGE_F32) {
                    reinterpret_cast<float4*>(plain)[i] = v[0];
                    reinterpret_cast<float4*>(plain)[i + 1] = v[1];
                }
            }
            if (quantize) store_quantized(v, 4 * i, cols, q, meta);
        }
        squares = warp_sum(squares);
        if (lane == 0) warp_squares[warp] = squares;
    }
    if (STAGE_Q8 && !quantize) {
        const uint4* codes = reinterpret_cast<const uint4*>(rows.q + (size_t)first * cols);
#pragma unroll 1
        for (int i = threadIdx.x; i < elements / 16; i += kThreads) reinterpret_cast<uint4*>(q)[i] = codes[i];
        const int2* blocks = reinterpret_cast<const int2*>(rows.meta + (size_t)first * (cols / 32));
#pragma unroll 1
        for (int i = threadIdx.x; i < elements / 32; i += kThreads) reinterpret_cast<int2*>(meta)[i] = blocks[i];
    }
    __syncthreads();
    if (!rows.norm) return 1.f;
    const float mean = __fdiv_rn(warp_sum<WARPS>(warp_squares[lane % WARPS]), (float)cols);
    return rsqrtf(__fadd_rn(mean, rows.eps));
}
