// Scale each query row by a factor of its position, in place, before RoPE.
//
//   q[r] = q[r] · scales[p], with p the position of row r
// Shapes: q [R, width] f32; scales [context] f32. In prefill `rows` has the positions
// (prefill_batch.cuh). In decode it is null, and row r has the position of slot row_slots[r] i32,
// or of slot 0 if row_slots is null, in positions [S] i32. Nothing is written for a row without a
// token or slot, or with a position outside of the table.
// Grid (R, blocks of a row), 256 threads. Alignment: 4 bytes. Bytes: 8 an element, none if the
// factor is 1. Everything is read after the wait. Rounding: one product an element.
// Twin: `CpuOps.attention` in worker/cpu/ops.py. Launcher: worker/gpu/query_scales.py.
#include "pdl.cuh"
#include "prefill_batch.cuh"

__global__ void __launch_bounds__(256)
    scale_queries(float* q, const float* scales, const PrefillRow* rows, const int* row_slots, const int* positions, int width,
                  int context) {
    grid_dependency_wait();
    const int row = blockIdx.x;
    int position;
    if (rows) {
        position = rows[row].position;
    } else {
        const int slot = row_slots ? row_slots[row] : 0;
        position = slot < 0 ? -1 : positions[slot];
    }
    if ((unsigned int)position >= (unsigned int)context) return;
    const float scale = scales[position];
    if (scale == 1.f) return;
    float* const x = q + (size_t)row * width;
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < width; i += gridDim.y * blockDim.x)
        x[i] = __fmul_rn(x[i], scale);
}
