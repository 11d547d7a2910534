// Limit logits to ±cap, in place.
//
//   x[i] = cap · tanh(x[i] / cap)
// Shapes: x [count] f32. Grid: any number of blocks of any size. Alignment: 4 bytes. Bytes:
// 8·count.
// Everything is read after the wait. Rounding: the quotient, tanhf (within 2 ulp) and the product.
// Twin: `softcap` in worker/cpu/ops.py. Launcher: worker/gpu/softcap.py.
#include "pdl.cuh"

__global__ void softcap(float* x, float cap, int count) {
    grid_dependency_wait();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
        x[i] = __fmul_rn(cap, tanhf(__fdiv_rn(x[i], cap)));
}
