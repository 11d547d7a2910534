// Decode: x[t] = residual[t] + Σ_j weight[t, j]·(W_e·h[t, j] + b_e), e = experts[t, j]: the experts' way back.
//
// A block is a run of rows of the token's result: 16 warps, warp j of each k of them takes the j-th expert's row, then the
// k results are added in the order of the routes. The k rows of h are staged in shared memory (staged.cuh). Grid x over
// blocks, y over tokens; k ≤ 16. Reads each chosen expert's weights once a token, DEPTH loads of 16 bytes a lane in flight,
// the first before h is there (pdl.cuh): routes and residual are older than the launch before this one.
// Twin: `experts_add` in worker/cpu/ops.py; worker/cpu/quantized.py.
#include "dots.cuh"
#include "pdl.cuh"

template <int DEPTH, class W>
__global__ void __launch_bounds__(kThreads, 2)
    experts_add(const Planes planes, const float* __restrict__ bias, const Rows h, const int* __restrict__ experts,
                const float* __restrict__ weights, const int k, const int rows, const float* __restrict__ residual,
                float* __restrict__ out) {
    extern __shared__ __align__(16) u8 shared[];
    __shared__ float partial[2][kWarps];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, j = warp % k, slots = kWarps / k, slot = warp / k;
    const int units = h.cols / Unit<W>::kElements, route = blockIdx.y * k + j;
    const int begin = rows * blockIdx.x / gridDim.x, end = rows * (blockIdx.x + 1) / gridDim.x;
    const u32 expert = experts[route];
    const float weight = weights[route];
    int row = begin + slot;
    Tile<W, 1, DEPTH> tile;
    const auto run_from = [&](int first) -> Run {
        return {planes, planes, (expert * rows + first) * units, end - first, units, 0, 1};
    };
    const bool mine = slot < slots;
    const auto works = [&](int at) { return mine && at < end; };
    if (works(row)) tile.begin(run_from(row));
    const auto bias_of = [&](int at) { return works(at) && bias ? bias[(size_t)expert * rows + at] : 0.f; };
    const auto residual_of = [&](int at) { return works(at) && j == 0 ? residual[(size_t)blockIdx.y * rows + at] : 0.f; };
    float next_bias = bias_of(row), next_residual = residual_of(row);
    Activations x;
    launch_dependents();
    grid_dependency_wait();
    stage<kReadsBlocks<W>, !kReadsBlocks<W>>(h, blockIdx.y * k, k, shared, x);
    for (int at = begin, turn = 0; at < end; at += slots, row += slots, turn ^= 1) {
        float sums[1] = {};
        const float b = next_bias, before = next_residual;
        if (works(row)) tile.add(sums, run_from(row), x.row(j));
        if (works(row + slots)) tile.begin(run_from(row + slots));
        next_bias = bias_of(row + slots), next_residual = residual_of(row + slots);
        sum_lanes(sums);
        if (lane == 0) partial[turn][warp] = weight * (sums[0] + b);
        __syncthreads();
        if (!works(row) || j != 0 || lane != 0) continue;
        float y = before;
        for (int i = 0; i < k; ++i) y += partial[turn][warp + i];
        out[(size_t)blockIdx.y * rows + row] = y;
    }
}
