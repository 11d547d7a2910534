// Rows for the products: RMSNorm (or none), then int8 blocks for the decode path.
//
//   n = x / sqrt(mean(x²) + eps) · weight   (Zhang and Sennrich 2019, arXiv:1910.07467); without a weight n = x.
// x [T, cols] f32, weight [cols] f32 or null; cols is a multiple of 32, arrays are 16-byte aligned. Grid (T), 256 threads:
// a block a row, four neighbours a thread, so that eight lanes hold a quantized block. Sums run in a fixed order.
//   norm_forms     q, meta as in quantized.cuh or null; y [T, cols] f32 or null    bytes a row: 4·cols + 1.25·cols + 4·cols
// Twins: `rms_norm` in worker/cpu/plain.py, `quantize` in worker/cpu/quantized.py.
#include "half.cuh"
#include "quantized.cuh"
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
    norm_forms(u8* q, Meta* meta, float* y, const float* x, const float* weight, int cols, float eps) {
    const Row row(x, weight, cols, eps);
    u8* codes = q + (size_t)blockIdx.x * cols;
    Meta* blocks = meta + (size_t)blockIdx.x * (cols / 32);
    for (int base = threadIdx.x / 32 * 32; base < row.quads; base += kThreads) {  // whole warps, as store_quantized asks
        const int i = base + threadIdx.x % 32;
        const float4 n = i < row.quads ? row.n(i) : make_float4(0.f, 0.f, 0.f, 0.f);
        if (q) store_quantized(n, 4 * i, cols, codes, blocks);
        if (y && i < row.quads) reinterpret_cast<float4*>(y + (size_t)blockIdx.x * cols)[i] = n;
    }
}
