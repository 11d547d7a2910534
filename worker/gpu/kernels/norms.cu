// Rows for prefill's products: RMSNorm (or none), then f16 for the tensor cores.
//
//   n = x / sqrt(mean(x²) + eps) · weight   (Zhang and Sennrich 2019, arXiv:1910.07467); without a weight n = x.
// x [T, cols] f32, weight [cols] f32 or null; cols is a multiple of 32, arrays are 16-byte aligned; y [T, cols] f16 of
// n / scale, scale [T] f32: the power of two that brings the row's largest to [1024, 2048), so that f16 keeps 11 bits down
// to 2^-24 of it. Grid (T), 256 threads: a block a row, four neighbours a thread. Sums run in a fixed order. Bytes a row:
// 6·cols. Twins: `rms_norm` in worker/cpu/plain.py, `in_f16` in worker/cpu/quantized.py.
#include "half.cuh"
#include "warp.cuh"

constexpr int kThreads = 256;

struct Row {
    const float4 *x, *weight;
    int quads;
    float factor;  // 1 / sqrt(mean(x²) + eps), to every thread

    __device__ __forceinline__ Row(const float* all, const float* weight, int cols, float eps)
        : x(reinterpret_cast<const float4*>(all + (size_t)blockIdx.x * cols)),
          weight(reinterpret_cast<const float4*>(weight)), quads(cols / 4), factor(1.f) {
        if (!weight) return;
        __shared__ float scratch[32];
        float squares = 0.f;
        for (int i = threadIdx.x; i < quads; i += kThreads) {
            const float4 v = x[i];
            squares += v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
        }
        factor = 1.f / sqrtf(block_sum(squares, scratch) / cols + eps);
    }

    __device__ __forceinline__ float4 n(int i) const {
        const float4 v = x[i];
        if (!weight) return v;
        const float4 w = weight[i];
        return make_float4(v.x * factor * w.x, v.y * factor * w.y, v.z * factor * w.z, v.w * factor * w.w);
    }
};

extern "C" __global__ void __launch_bounds__(kThreads)
    norm_halve(unsigned short* y, float* scale, const float* x, const float* weight, int cols, float eps) {
    __shared__ float scratch[32];
    const Row row(x, weight, cols, eps);
    float peak = 0.f;
    for (int i = threadIdx.x; i < row.quads; i += kThreads) {
        const float4 n = row.n(i);
        peak = fmaxf(peak, fmaxf(fmaxf(fabsf(n.x), fabsf(n.y)), fmaxf(fabsf(n.z), fabsf(n.w))));
    }
    const int exponent = (int)(__float_as_uint(block_max(peak, scratch)) >> 23) - 127;  // 2^exponent ≤ peak
    const int shift = exponent == -127 ? 0 : min(max(exponent - 10, -100), 100);        // a row of zeros stays
    const float inverse = __uint_as_float((unsigned int)(127 - shift) << 23);
    if (threadIdx.x == 0) scale[blockIdx.x] = __uint_as_float((unsigned int)(127 + shift) << 23);
    uint2* out = reinterpret_cast<uint2*>(y + (size_t)blockIdx.x * cols);
    for (int i = threadIdx.x; i < row.quads; i += kThreads) {
        const float4 n = row.n(i);
        out[i] = make_uint2(floats_to_half2(n.x * inverse, n.y * inverse), floats_to_half2(n.z * inverse, n.w * inverse));
    }
}
