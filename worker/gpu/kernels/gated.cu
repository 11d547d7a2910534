// Prefill: h = gated(gate, up), element by element (gated.cuh). gate, up, h [n] f32; h may be gate.
//
// A thread an element, blocks of 256. Reads 8 and writes 4 bytes an element. Twin: `gated` in worker/cpu/plain.py.
#include "pdl.cuh"
#include "gated.cuh"

__global__ void gated_elements(const float* gate, const float* up, const Gate activation, const size_t n, float* h) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    grid_dependency_wait();
    if (i < n) h[i] = gated(gate[i], up[i], activation);
}
