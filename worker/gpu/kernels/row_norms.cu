// Before the first prompt: the greatest 2-norm of a matrix's rows, as products of prefill read them (f16), and the
// greatest |bias|. Both bound the results of a product: |W·n + b| ≤ ‖W‖·‖n‖ + |b|, row by row.
//
// Shapes: W [rows, cols] in planes, all experts' rows one after another, cols a multiple of 32;
// bias [rows] f32 or null; greatest[0] and greatest[2] f32 become at least the norm and the |bias|.
// Grid: ⌈rows/8⌉ blocks of 256 threads, a warp a row. Alignment: 16 bytes. Bytes: the weights once.
// Order: a lane's units ascending, then the warp's butterfly.
// Twin: `greatest_norms` in tests/quantized_ops.py. Launcher: worker/gpu/glu_bounds.py.
#include "formats.cuh"
#include "warp.cuh"

// *to = max(*to, value). The order of floats ≥ 0 is that of their bits; most values need no atomic.
// Results of a row that is not finite are not finite whatever the bound.
__device__ __forceinline__ void raise_to(float* to, float value) {
    if (value <= 3.4e38f && value > *(const volatile float*)to) atomicMax(reinterpret_cast<int*>(to), __float_as_int(value));
}

template <class Block>
__global__ void __launch_bounds__(256) row_norms(const Planes planes, const float* bias, const int rows, const int row_units,
                                                 float* greatest) {
    constexpr int kPairs = Unit<Block>::kElements / 2;
    const int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    float squares = 0.f;
    for (int i = lane; i < row_units; i += 32) {
        const u32 at = (u32)row * row_units + i;
        Unit<Block> unit;
        u32 h[kPairs];
        unit.load(planes, at);
        unit.to_half2(at, h);
#pragma unroll
        for (int k = 0; k < kPairs; ++k) {
            const float2 w = half2_to_float2(h[k]);
            squares = __fmaf_rn(w.x, w.x, __fmaf_rn(w.y, w.y, squares));
        }
    }
    squares = warp_sum(squares);
    if (lane > 0) return;
    raise_to(greatest, __fsqrt_rn(squares));
    if (bias) raise_to(greatest + 2, fabsf(bias[row]));
}
