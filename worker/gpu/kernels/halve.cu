// Prefill: rows for the tensor cores: RMSNorm (or none), then f16 under a power of two, in the order of fragments.cuh.
//
//   n = x / sqrt(mean(x²) + eps) · weight   (Zhang and Sennrich 2019, arXiv:1910.07467); without a weight n = x.
// x [T, cols] f32, weight [cols] f32 or null; y [T, padded cols] f16 of n / scale, scale [T] f32: the power of two that
// brings the row's largest to [1024, 2048), so f16 keeps 11 bits down to 2^-24 of it. cols is a multiple of 32, arrays are
// 16-byte aligned. Rows from *count · per on are left alone; count may be null. Grid (T), 256 threads: a block a row, four
// neighbours a thread, the first 8,192 columns kept in registers. Bytes a row: 6·cols. Sums run in a fixed order. Twins:
// `rms_norm` in worker/cpu/plain.py, `in_f16` in worker/cpu/quantized.py.
#include "early.cuh"
#include "fragments.cuh"
#include "half.cuh"
#include "warp.cuh"

constexpr int kThreads = 256, kKept = 8;

__device__ __forceinline__ float largest(float4 v) {
    return fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
}

extern "C" __global__ void __launch_bounds__(kThreads)
    halve(unsigned int* y, float* scale, const float4* x, const float4* weight, const int* count, int per, int cols,
          float eps) {
    __shared__ float scratch[32];
    if (count && blockIdx.x >= *count * per) return;
    const int quads = cols / 4;
    if (weight && 8 * threadIdx.x < quads)  // they last met the cache a layer or a piece ago
        asm volatile("prefetch.global.L2 [%0];" ::"l"(weight + 8 * threadIdx.x));
    wait_for_inputs();
    x += (size_t)blockIdx.x * quads;
    float peak = 0.f, squares = 0.f;
    const float4 zero = make_float4(0.f, 0.f, 0.f, 0.f), one = make_float4(1.f, 1.f, 1.f, 1.f);
    float4 kept[kKept];
#pragma unroll
    for (int j = 0; j < kKept; ++j) {
        const int i = threadIdx.x + j * kThreads;
        kept[j] = i < quads ? x[i] : zero;
    }
    const auto see = [&](float4 v, int i) {
        squares += v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
        const float4 w = weight ? weight[i] : one;
        peak = fmaxf(peak, largest(make_float4(v.x * w.x, v.y * w.y, v.z * w.z, v.w * w.w)));
    };
#pragma unroll
    for (int j = 0; j < kKept; ++j)
        if (threadIdx.x + j * kThreads < quads) see(kept[j], threadIdx.x + j * kThreads);
    for (int i = threadIdx.x + kKept * kThreads; i < quads; i += kThreads) see(x[i], i);
    float factor = 1.f;
    if (weight) factor = 1.f / sqrtf(block_sum(squares, scratch) / cols + eps);
    peak = block_max(peak, scratch) * factor;
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
    const int all = padded(cols) / 4;
#pragma unroll
    for (int j = 0; j < kKept; ++j)
        if (threadIdx.x + j * kThreads < all) put(kept[j], threadIdx.x + j * kThreads);
    for (int i = threadIdx.x + kKept * kThreads; i < all; i += kThreads) put(i < quads ? x[i] : zero, i);
}
