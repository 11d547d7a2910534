// Prefill: RMSNorm (or none), then f16 with a power of two for each row, in the column order of
// fragments.cuh.
//
//   n = x / sqrt(mean(x²) + eps) · weight   (Zhang and Sennrich 2019, arXiv:1910.07467)
// Without a weight n = x.
// Shapes: x [T, cols] f32, weight [cols] f32 or null; y [T, padded cols] f16 of n / scale; scale
// [T] f32, the power of two that brings the row's largest element into [1024, 2048), so that f16
// keeps 11 bits down to 2^-24 of it. cols is a multiple of 32. Rows from *count · rows_per_token on
// are not written; count may be null. With `places` [T·rows_per_token] row t of x is written to
// rows places[t·rows_per_token], …, places[(t + 1)·rows_per_token - 1] of y, scale and h_scale.
// With GLU, h_scale [T] f32: the power of two that brings a bound of the row's gated FFN h below
// 2^15, from glu_bounds = (G, U, a, b) with |gate| ≤ G·‖n‖ + a and |up| ≤ U·‖n‖ + b
// (worker/gpu/glu_bounds.py). The factor that is left to f16's 65,504 is for roundings of n.
// Grid: rows of x, 256 threads: a block a row, four adjacent elements a thread, KEPT times in
// registers (1,024·KEPT columns); further columns are read twice. Alignment: 16 bytes. Bytes:
// 4·cols a row read, 2·cols a row written.
// Order and rounding: a thread's float4 ascending (sum_of_squares), the warp's butterfly, then
// warps ascending.
// Twins: `rms_norm` in worker/cpu/plain.py, `in_f16`, `h_scales` in tests/quantized_ops.py.
// Launcher: worker/gpu/activations.py.
#include "pdl.cuh"
#include "fragments.cuh"
#include "half.cuh"
#include "warp.cuh"

constexpr int kThreads = SCALE_THREADS, kWarps = kThreads / 32;

__device__ __forceinline__ float max_abs(float4 v) {
    return fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
}

// The exponent of the power of two that brings `greatest` ≥ 0 into [2^top, 2^(top + 1)); 0 for zero.
__device__ __forceinline__ int exponent_of_scale(float greatest, int top) {
    const int exponent = (int)(__float_as_uint(greatest) >> 23) - 127;  // 2^exponent ≤ greatest
    return exponent == -127 ? 0 : min(max(exponent - top, -100), 100);
}

__device__ __forceinline__ float power_of_two(int exponent) {
    return __uint_as_float((unsigned int)(127 + exponent) << 23);
}

template <int KEPT, bool GLU>
__global__ void __launch_bounds__(kThreads)
    scale_to_f16(unsigned int* y, float* scale, float* h_scale, const float4* x, const float4* weight,
                 const float* glu_bounds, const int* count, int rows_per_token, const int* places, int cols, float eps) {
    __shared__ float2 warp_results[kWarps];             // sum of squares, peak
    __shared__ float weighted_sums[GLU ? kWarps : 1];  // of squares, after the weight
    if (count && blockIdx.x >= *count * (places ? 1 : rows_per_token)) return;
    const int quads = cols / 4, padded_quads = padded(cols) / 4;
    // Before the wait (pdl.cuh): *count, which no kernel writes, and norm weights, constant during
    // a step. The weights were last read one chunk ago, so they are prefetched.
    if (weight && 8 * threadIdx.x < quads)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(weight + 8 * threadIdx.x));
    grid_dependency_wait();
    x += (size_t)blockIdx.x * quads;
    float peak = 0.f, squares = 0.f, weighted = 0.f;
    const float4 zero = make_float4(0.f, 0.f, 0.f, 0.f), one = make_float4(1.f, 1.f, 1.f, 1.f);
    float4 kept[KEPT];
#pragma unroll
    for (int j = 0; j < KEPT; ++j) {
        const int i = threadIdx.x + j * kThreads;
        kept[j] = i < quads ? x[i] : zero;
    }
    const auto accumulate = [&](float4 v, int i, bool swapped) {
        // `swapped`: the bits of rows of up to 1,024 columns, whose squares are fused in the other
        // order.
        squares = __fadd_rn(squares, sum_of_squares(swapped ? make_float4(v.y, v.x, v.w, v.z) : v));
        const float4 w = weight ? weight[i] : one;
        const float4 n = make_float4(v.x * w.x, v.y * w.y, v.z * w.z, v.w * w.w);
        peak = fmaxf(peak, max_abs(n));
        if (GLU) weighted = __fadd_rn(weighted, sum_of_squares(n));
    };
#pragma unroll
    for (int j = 0; j < KEPT; ++j)
        if (threadIdx.x + j * kThreads < quads) accumulate(kept[j], threadIdx.x + j * kThreads, KEPT == 1);
#pragma unroll 1
    for (int i = threadIdx.x + KEPT * kThreads; i < quads; i += kThreads) accumulate(x[i], i, false);
    squares = warp_sum(squares), peak = warp_max(peak);
    if (threadIdx.x % 32 == 0) warp_results[threadIdx.x / 32] = make_float2(squares, peak);
    if constexpr (GLU) {
        weighted = warp_sum(weighted);
        if (threadIdx.x % 32 == 0) weighted_sums[threadIdx.x / 32] = weighted;
    }
    __syncthreads();
    squares = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) squares = __fadd_rn(squares, warp_results[w].x), peak = fmaxf(peak, warp_results[w].y);
    const float factor = weight ? __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(squares, (float)cols), eps))) : 1.f;
    const int shift = exponent_of_scale(peak * factor, 10);
    const float inverse = power_of_two(-shift) * factor;
    const int copies = places ? rows_per_token : 1;
    const auto row_of = [&](int copy) { return places ? places[blockIdx.x * copies + copy] : blockIdx.x; };
    if (threadIdx.x < copies) scale[row_of(threadIdx.x)] = power_of_two(shift);
    const auto store = [&](float4 v, int i) {
        const float4 w = weight && i < quads ? weight[i] : one;
        const unsigned int at = fragment_index(4 * i) / 2;
        const unsigned int low = floats_to_half2(v.x * inverse * w.x, v.y * inverse * w.y);
        const unsigned int high = floats_to_half2(v.z * inverse * w.z, v.w * inverse * w.w);
        for (int copy = 0; copy < copies; ++copy) {
            unsigned int* const out = y + (size_t)row_of(copy) * (padded(cols) / 2);
            out[at] = low, out[at + 4] = high;
        }
    };
#pragma unroll
    for (int j = 0; j < KEPT; ++j)
        if (threadIdx.x + j * kThreads < padded_quads) store(kept[j], threadIdx.x + j * kThreads);
#pragma unroll 1
    for (int i = threadIdx.x + KEPT * kThreads; i < padded_quads; i += kThreads) store(i < quads ? x[i] : zero, i);
    if constexpr (GLU) {
        if (threadIdx.x >= copies) return;
        weighted = 0.f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) weighted = __fadd_rn(weighted, weighted_sums[w]);
        // Where squares leave the range of f32, the largest element gives a looser bound.
        const bool exact = weighted > 1e-28f && weighted < 1e38f;
        const float root = exact ? __fsqrt_rn(weighted) : __fmul_rn(__fsqrt_rn((float)cols), peak);
        const float norm = fmaxf(__fmul_rn(root, factor), 0.f);  // 0 for a NaN
        const float gate = __fmaf_rn(glu_bounds[0], norm, glu_bounds[2]), up = __fmaf_rn(glu_bounds[1], norm, glu_bounds[3]);
        h_scale[row_of(threadIdx.x)] = power_of_two(exponent_of_scale(__fmul_rn(gate, up), 14));
    }
}
