// y = gated(y, up), element by element (gated.cuh), with a group of a row's inputs for up.
//
// Shapes: y [T, width] f32; inputs [T, stride] f32, of which up has the columns first … first +
// width.
// Rows from *count on are not written; count may be null.
// Grid (T, ⌈width/256⌉), block 256, one element a thread. Alignment: 4 bytes. Bytes: 12 an element.
// Twin: `linear_gate` in worker/cpu/ops.py. Launcher: worker/gpu/layer_inputs.py.
#include "pdl.cuh"
#include "gated.cuh"

template <bool GELU>
__global__ void gate_group(float* y, const float* inputs, const int* count, int width, int stride, int first,
                           const Gate activation) {
    const int i = blockIdx.y * blockDim.x + threadIdx.x;
    const size_t row = blockIdx.x;
    // Before the wait (pdl.cuh): *count, which no kernel writes.
    if (i >= width || (count && row >= *count)) return;
    grid_dependency_wait();
    y[row * width + i] = gated<GELU>(y[row * width + i], inputs[row * stride + first + i], activation);
}
