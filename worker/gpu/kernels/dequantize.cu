// Matrix to f32: y[r] = W[ids[r]] for tokens of an embedding table, or the whole matrix; bit for
// bit gguf.quants. `scaled_rows` multiplies each element by `scale`, with one rounding.
//
// Shapes: W [rows, cols] in planes, cols a multiple of 32; ids [R] i32, or null for row r itself; y
// [R, cols] f32. With row_slots [R] i32, y[r] = W[ids[row_slots[r]]], or zeros if that is negative.
// Grid: x over R, y over the units of a row (32 elements, or 16 bytes of F32, F16, BF16); 128
// threads, one unit each.
// Alignment: 16 bytes. Bytes: the weights of the rows read once, 4 an element written (as float4).
// Twins: `dequantize` in worker/quants.py, `embed` in worker/cpu/ops.py. Launcher:
// worker/gpu/layouts.py.
#include "pdl.cuh"
#include "formats.cuh"

template <class Block, bool SCALED>
__device__ __forceinline__ void write_rows(const Planes& planes, const int* __restrict__ ids,
                                           const int* __restrict__ row_slots, float* __restrict__ out,
                                           const int row_units, const float scale) {
    const int unit = blockIdx.y * blockDim.x + threadIdx.x;
    launch_dependents();
    grid_dependency_wait();
    if (unit >= row_units) return;
    const int at = row_slots ? row_slots[blockIdx.x] : blockIdx.x;
    constexpr int n = Unit<Block>::kElements;
    float4* to = reinterpret_cast<float4*>(out + (size_t)blockIdx.x * row_units * n) + unit * (n / 4);
    if (at < 0) {
#pragma unroll 1
        for (int e = 0; e < n; e += 4) to[e / 4] = make_float4(0.f, 0.f, 0.f, 0.f);
        return;
    }
    const u32 row = ids ? ids[at] : at;
    Unit<Block> w;
    float v[n];
    w.load(planes, row * row_units + unit);
    w.to_float(row * row_units + unit, v);
    if constexpr (SCALED) {
#pragma unroll
        for (int e = 0; e < n; ++e) v[e] = __fmul_rn(v[e], scale);
    }
#pragma unroll
    for (int e = 0; e < n; e += 4) to[e / 4] = make_float4(v[e], v[e + 1], v[e + 2], v[e + 3]);
}

template <class Block>
__global__ void dequantize(const Planes planes, const int* __restrict__ ids, const int* __restrict__ row_slots,
                           float* __restrict__ out, const int row_units) {
    write_rows<Block, false>(planes, ids, row_slots, out, row_units, 1.f);
}

template <class Block>
__global__ void scaled_rows(const Planes planes, const int* __restrict__ ids, const int* __restrict__ row_slots,
                            float* __restrict__ out, const int row_units, const float scale) {
    write_rows<Block, true>(planes, ids, row_slots, out, row_units, scale);
}
