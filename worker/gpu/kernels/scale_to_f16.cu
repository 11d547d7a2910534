// Prefill: rows for the tensor cores: RMSNorm (or none), then f16 under a power of two, in the order of fragments.cuh.
//
//   n = x / sqrt(mean(x²) + eps) · weight   (Zhang and Sennrich 2019, arXiv:1910.07467); without a weight n = x.
// x [T, cols] f32, weight [cols] f32 or null; y [T, padded cols] f16 of n / scale, scale [T] f32: the power of two that
// brings the row's largest to [1024, 2048), so f16 keeps 11 bits down to 2^-24 of it. cols is a multiple of 32, arrays are
// 16-byte aligned. Rows from *count · per on are left alone; count may be null. Grid (T), 256 threads: a block a row, four
// neighbours a thread, KEPT times in registers: 1,024·KEPT columns, the rest is read twice. Bytes a row: 6·cols. Sums run in a
// fixed order. Twins: `rms_norm` in worker/cpu/plain.py, `in_f16` in worker/cpu/quantized.py.
#include "pdl.cuh"
#include "fragments.cuh"
#include "half.cuh"
#include "warp.cuh"

constexpr int kThreads = 256, kWarps = kThreads / 32;

__device__ __forceinline__ float largest(float4 v) {
    return fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
}

template <int KEPT>
__global__ void __launch_bounds__(kThreads)
    scale_to_f16(unsigned int* y, float* scale, const float4* x, const float4* weight, const int* count, int per, int cols,
          float eps) {
    __shared__ float2 of_warps[kWarps];  // sum of squares, peak
    if (count && blockIdx.x >= *count * per) return;
    const int quads = cols / 4, all = padded(cols) / 4;
    if (weight && 8 * threadIdx.x < quads)  // they last met the cache a layer or a piece ago
        asm volatile("prefetch.global.L2 [%0];" ::"l"(weight + 8 * threadIdx.x));
    grid_dependency_wait();
    x += (size_t)blockIdx.x * quads;
    float peak = 0.f, squares = 0.f;
    const float4 zero = make_float4(0.f, 0.f, 0.f, 0.f), one = make_float4(1.f, 1.f, 1.f, 1.f);
    float4 kept[KEPT];
#pragma unroll
    for (int j = 0; j < KEPT; ++j) {
        const int i = threadIdx.x + j * kThreads;
        kept[j] = i < quads ? x[i] : zero;
    }
    const auto see = [&](float4 v, int i) {
        squares += v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
        const float4 w = weight ? weight[i] : one;
        peak = fmaxf(peak, largest(make_float4(v.x * w.x, v.y * w.y, v.z * w.z, v.w * w.w)));
    };
#pragma unroll
    for (int j = 0; j < KEPT; ++j)
        if (threadIdx.x + j * kThreads < quads) see(kept[j], threadIdx.x + j * kThreads);
#pragma unroll 1
    for (int i = threadIdx.x + KEPT * kThreads; i < quads; i += kThreads) see(x[i], i);
    squares = warp_sum(squares), peak = warp_max(peak);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = make_float2(squares, peak);
    __syncthreads();
    squares = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) squares += of_warps[w].x, peak = fmaxf(peak, of_warps[w].y);
    const float factor = weight ? 1.f / sqrtf(squares / cols + eps) : 1.f;
    peak *= factor;
    const int exponent = (int)(__float_as_uint(peak) >> 23) - 127;                // 2^exponent ≤ peak
    const int shift = exponent == -127 ? 0 : min(max(exponent - 10, -100), 100);  // a row of zeros stays
    const float inverse = __uint_as_float((unsigned int)(127 - shift) << 23) * factor;
    if (threadIdx.x == 0) scale[blockIdx.x] = __uint_as_float((unsigned int)(127 + shift) << 23);
    unsigned int* const out = y + (size_t)blockIdx.x * (padded(cols) / 2);
    const auto put = [&](float4 v, int i) {
        const float4 w = weight && i < quads ? weight[i] : one;
        const unsigned int at = place_of(4 * i) / 2;
        out[at] = floats_to_half2(v.x * inverse * w.x, v.y * inverse * w.y);
        out[at + 4] = floats_to_half2(v.z * inverse * w.z, v.w * inverse * w.w);
    };
#pragma unroll
    for (int j = 0; j < KEPT; ++j)
        if (threadIdx.x + j * kThreads < all) put(kept[j], threadIdx.x + j * kThreads);
#pragma unroll 1
    for (int i = threadIdx.x + KEPT * kThreads; i < all; i += kThreads) put(i < quads ? x[i] : zero, i);
}
