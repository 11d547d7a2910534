// A whole matrix as f32, bit for bit as `gguf.quants` de-quantizes it, and rows of a table for tokens (embedding).
//
// y[r, c] = value of W[r, c]. A thread does one unit (32 elements, or 16 bytes of f32, f16 and bf16): grid x over rows,
// y over the units of a row; blocks of 128 threads. Moves the weights' bytes once and 4 bytes an element out.
// `ids` null: row x of W becomes row x of out; else row ids[x] does. Rows are multiples of 32, stores float4.
// Twin: `dequantize` in worker/quants.py, `embed` in worker/cpu/ops.py.
#include "pdl.cuh"
#include "formats.cuh"

template <class Block>
__global__ void dequantize(const Planes planes, const int* __restrict__ ids, float* __restrict__ out,
                           const int row_units) {
    const int unit = blockIdx.y * blockDim.x + threadIdx.x;
    launch_dependents();
    grid_dependency_wait();
    if (unit >= row_units) return;
    const u32 row = ids ? ids[blockIdx.x] : blockIdx.x;
    constexpr int n = Unit<Block>::kElements;
    Unit<Block> w;
    float v[n];
    w.load(planes, row * row_units + unit);
    w.values(row * row_units + unit, v);
    float4* to = reinterpret_cast<float4*>(out + (size_t)blockIdx.x * row_units * n) + unit * (n / 4);
#pragma unroll
    for (int e = 0; e < n; e += 4) to[e / 4] = make_float4(v[e], v[e + 1], v[e + 2], v[e + 3]);
}
