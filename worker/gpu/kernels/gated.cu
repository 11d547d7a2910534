// Prefill: h = gated(gate, up), element by element (gated.cuh), for a gate and an up of different
// types; h is the next product's x: f16 in the column order of fragments.cuh, divided by h_scale.
//
// Shapes: gate, up [T, rows] f32; h_scale [T] f32, powers of two; h [T, padded rows] f16, zeros
// where there is no column.
// Grid: x over T, y over pairs of h; 256 threads, one pair each. Alignment: 4 bytes.
// Bytes: 8 read and 2 written an element. Twin: `gated` in worker/cpu/plain.py. Launcher:
// worker/gpu/matmul.py.
#include "pdl.cuh"
#include "fragments.cuh"
#include "gated.cuh"
#include "half.cuh"

template <bool GELU>
__global__ void gated_elements(const float* gate, const float* up, const float* h_scale, const Gate activation,
                               const int rows, unsigned int* h) {
    const unsigned int pair = blockIdx.y * blockDim.x + threadIdx.x, pairs = padded(rows) / 2;
    grid_dependency_wait();
    if (pair >= pairs) return;
    const int column = fragment_column(2 * pair);
    const float inverse = __frcp_rn(h_scale[blockIdx.x]);
    const auto element = [&](int c) {
        const size_t at = (size_t)blockIdx.x * rows + c;
        return c < rows ? gated<GELU>(gate[at], up[at], activation) * inverse : 0.f;
    };
    h[(size_t)blockIdx.x * pairs + pair] = floats_to_half2(element(column), element(column + 1));
}
