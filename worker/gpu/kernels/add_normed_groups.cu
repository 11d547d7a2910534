// RMSNorm of each group of a row, added to the group of another row: the inputs of all layers.
//
//   x[t, g] = x[t, g] + y[t, g] / sqrt(mean(y[t, g]²) + eps) · weight
// Shapes: x, y [T, groups·width] f32, weight [width] f32; width is a multiple of 4. Rows from
// *count on are not written; count may be null.
// Grid (T, ⌈groups / GROUP_WARPS⌉), block 32·GROUP_WARPS: a warp a group, float4s lane, lane + 32,
// ….
// Alignment: 16 bytes. Bytes: 16 an element.
// Order and rounding: a lane's float4s ascending (sum_of_squares), then the warp's butterfly; as in
// the twin, the factor 1/sqrt is rounded twice, each product and sum once.
// Twin: `layer_inputs` in worker/cpu/ops.py. Launcher: worker/gpu/layer_inputs.py.
#include "pdl.cuh"
#include "warp.cuh"

__global__ void __launch_bounds__(32 * GROUP_WARPS)
    add_normed_groups(float4* x, const float4* y, const float4* weight, const int* count, int groups, int width,
                      float eps) {
    const int lane = threadIdx.x % 32, group = blockIdx.y * GROUP_WARPS + threadIdx.x / 32, quads = width / 4;
    // Before the wait (pdl.cuh): *count, which no kernel writes.
    if (count && blockIdx.x >= *count) return;
    grid_dependency_wait();
    if (group >= groups) return;
    const size_t first = ((size_t)blockIdx.x * groups + group) * quads;
    float squares = 0.f;
    for (int i = lane; i < quads; i += 32) squares = __fadd_rn(squares, sum_of_squares(y[first + i]));
    const float factor = __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(warp_sum(squares), (float)width), eps)));
    const auto add = [&](float x, float y, float w) { return __fadd_rn(x, __fmul_rn(__fmul_rn(y, factor), w)); };
    for (int i = lane; i < quads; i += 32) {
        const float4 r = x[first + i], v = y[first + i], w = weight[i];
        x[first + i] = make_float4(add(r.x, v.x, w.x), add(r.y, v.y, w.y), add(r.z, v.z, w.z), add(r.w, v.w, w.w));
    }
}
