// Prefill: h = gated(gate, up), element by element (gated.cuh), for a gate and an up of different
// types.
//
// Shapes: gate, up, h [n] f32; h may be gate. Grid: ⌈n/256⌉ blocks of 256 threads, one element
// each. Alignment: 4 bytes.
// Bytes: 12 an element. Twin: `gated` in worker/cpu/plain.py. Launcher: worker/gpu/matmul.py.
#include "pdl.cuh"
#include "gated.cuh"

template <bool GELU>
__global__ void gated_elements(const float* gate, const float* up, const Gate activation, const size_t n, float* h) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    grid_dependency_wait();
    if (i < n) h[i] = gated<GELU>(gate[i], up[i], activation);
}
