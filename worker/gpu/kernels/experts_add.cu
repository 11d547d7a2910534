// Decode: x[t] = residual[t] + Σ_j weight[t, j]·(W_e·h[t, j] + b_e), e = experts[t, j]: the experts' way back.
//
// A block is `k` warps or a multiple: warp j of a group of k takes ROWS rows of the token's j-th expert, then the k
// results are added in the order of the routes. Grid x over rows, y over tokens; blockDim.x is 32·k·groups. Reads each
// chosen expert's weights once a token. Twin: `experts_add` in worker/cpu/ops.py; worker/cpu/quantized.py.
#include "dots.cuh"

constexpr int kMaxWarps = 16;

template <int ROWS, class W>
__global__ void __launch_bounds__(32 * kMaxWarps)
    experts_add(const Planes planes, const float* __restrict__ bias, const Activations h,
                const int* __restrict__ experts, const float* __restrict__ weights, const int k, const int rows,
                const float* __restrict__ residual, float* __restrict__ out) {
    __shared__ float partial[kMaxWarps][ROWS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, j = warp % k, groups = blockDim.x / 32 / k;
    const int first = (blockIdx.x * groups + warp / k) * ROWS, slot = blockIdx.y * k + j;
    const int expert = experts[slot], units = h.cols / Unit<W>::kElements;
    float sums[ROWS] = {};
    if (first < rows)
        add_dots<W, ROWS>(sums, planes, (u32)expert * rows * units, first, rows - 1, h.row(slot), units, 0, 1);
    sum_lanes(sums);
    const float weight = weights[slot];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const float b = bias && first + r < rows ? bias[(size_t)expert * rows + first + r] : 0.f;
        if (lane == r) partial[warp][r] = weight * (sums[r] + b);
    }
    __syncthreads();
    const int row = first + lane;
    if (j != 0 || lane >= ROWS || row >= rows) return;
    const size_t at = (size_t)blockIdx.y * rows + row;
    float y = residual[at];
    for (int i = 0; i < k; ++i) y += partial[warp + i][lane];
    out[at] = y;
}
