// A token's activations in shared memory, in the forms that the weights of a product read: 8-bit blocks, f32, or both.
//
// Rows come as 8-bit blocks from a producer that made them (gated FFN, attention), or as f32 and are quantized here, by
// every block for itself: the rows are short, lie in L2, and no launch comes between. Of an RMSNorm
//     n = x / sqrt(mean(x²) + eps) · weight   (Zhang and Sennrich 2019, arXiv:1910.07467)
// x·weight is staged; 1/sqrt(…) is one number a row, so it multiplies the products' sums and nobody waits for it.
// Sums run in a fixed order. Twins: `rms_norm` in worker/cpu/plain.py, `quantize` in worker/cpu/quantized.py.
#pragma once
#include "quantized.cuh"
#include "warp.cuh"

constexpr int kWarps = 16, kThreads = 32 * kWarps;

// Rows in global memory: x [T, cols] f32, or q and meta (quantized.cuh), or both; norm [cols] f32 or null.
struct Rows {
    const float* x;
    const u8* q;
    const Meta* meta;
    const float* norm;
    float eps;
    int cols;
};

// Rows in shared memory.
struct Activations {
    const u8* q;
    const Meta* meta;
    const float* x;
    int cols;
    __device__ __forceinline__ Activations row(int t) const {
        return {q + t * cols, meta + t * (cols / 32), x + t * cols, cols};
    }
};

// A norm's weights last met the cache a step ago: without this every launch would wait for them.
__device__ __forceinline__ void fetch_norm(const Rows& rows) {
    if (!rows.norm) return;
#pragma unroll 1
    for (int i = 32 * threadIdx.x; i < rows.cols; i += 32 * blockDim.x)  // a line of 128 bytes a thread
        asm volatile("prefetch.global.L2 [%0];" ::"l"(rows.norm + i));
}

// Stages `count` rows from row `first` on: f32 ones, where they are to be quantized or normed, one at a time. All WARPS warps
// of the block call it; `shared` is 16-byte aligned and holds count·cols·(4·PLAIN + 1.25·BLOCKS) bytes. Gives the number
// that the products' sums are to be multiplied by. Ends synchronized.
template <bool BLOCKS, bool PLAIN, int WARPS = kWarps>
__device__ __forceinline__ float stage(const Rows& rows, int first, int count, u8* shared, Activations& staged) {
    constexpr int kThreads = 32 * WARPS;
    __shared__ float squares_of[WARPS];
    const int cols = rows.cols, all = count * cols, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* plain = reinterpret_cast<float*>(shared);
    u8* q = shared + (PLAIN ? 4 * all : 0);
    Meta* meta = reinterpret_cast<Meta*>(q + all);
    staged = {q, meta, plain, cols};
    const bool quantize = BLOCKS && !rows.q;
    if (PLAIN || quantize) {
        const float4* x = reinterpret_cast<const float4*>(rows.x + (size_t)first * cols);
        const float4* weight = reinterpret_cast<const float4*>(rows.norm);
        float squares = 0.f;
#pragma unroll 1
        for (int base = 64 * warp; base < all / 4; base += 2 * kThreads) {  // whole warps, as store_quantized asks
            const int i = base + 2 * lane;
            float4 v[2] = {};
            if (i < all / 4) {
                v[0] = x[i], v[1] = x[i + 1];
                if (weight) {
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        const float4 w = __ldg(weight + i + j);
                        squares += v[j].x * v[j].x + v[j].y * v[j].y + (v[j].z * v[j].z + v[j].w * v[j].w);
                        v[j] = make_float4(v[j].x * w.x, v[j].y * w.y, v[j].z * w.z, v[j].w * w.w);
                    }
                }
                if (PLAIN) reinterpret_cast<float4*>(plain)[i] = v[0], reinterpret_cast<float4*>(plain)[i + 1] = v[1];
            }
            if (quantize) store_quantized(v, 4 * i, cols, q, meta);
        }
        squares = warp_sum(squares);
        if (lane == 0) squares_of[warp] = squares;
    }
    if (BLOCKS && !quantize) {
        const uint4* codes = reinterpret_cast<const uint4*>(rows.q + (size_t)first * cols);
#pragma unroll 1
        for (int i = threadIdx.x; i < all / 16; i += kThreads) reinterpret_cast<uint4*>(q)[i] = codes[i];
        const int2* blocks = reinterpret_cast<const int2*>(rows.meta + (size_t)first * (cols / 32));
#pragma unroll 1
        for (int i = threadIdx.x; i < all / 32; i += kThreads) reinterpret_cast<int2*>(meta)[i] = blocks[i];
    }
    __syncthreads();
    if (!rows.norm) return 1.f;
    return rsqrtf(warp_sum<WARPS>(squares_of[lane % WARPS]) / cols + rows.eps);
}
