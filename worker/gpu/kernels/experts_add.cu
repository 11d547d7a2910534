// Decode: x[t] = residual[t] + Σ_j weight·(W_e·h[t, j] + b_e), e the j-th expert of
// t (expert_choice.cuh): down projection and sum of experts.
//
// Shapes: W [E, rows, f] in planes of type W; bias [E, rows] f32 or null; h [T·k, f], k ≤ 16;
// residual (or null), x [T, rows] f32. The k rows of h are staged in shared memory
// (stage_activations.cuh).
// Grid: x over contiguous ranges of rows, y over T; 512 threads. Of each k warps warp j takes the
// row of the j-th expert; the k results are added in the order of the routes.
// Alignment: planes and h 16 bytes. Bytes: the weights of each chosen expert once a token, UNROLL_K
// 16-byte loads in flight a lane. Order and rounding: vec_dot.cuh, then weight·(sum + bias)
// rounded, then residual + each product ascending.
// Twins: `experts_add` in worker/cpu/ops.py; tests/quantized_ops.py. Launcher:
// worker/gpu/matvec.py.
#define WEIGHTS_EVICT_FIRST
#include "vec_dot.cuh"
#include "expert_choice.cuh"
#include "pdl.cuh"

template <int UNROLL_K, class W>
__global__ void __launch_bounds__(kThreads, 2)
    experts_add(const Planes planes, const float* __restrict__ bias, const InputRows h, const ExpertChoices choices,
                const int rows, const float* __restrict__ residual, float* __restrict__ out) {
    extern __shared__ __align__(16) u8 shared[];
    __shared__ float partial[2][kWarps];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, k = choices.k, j = warp % k;
    const int row_groups = kWarps / k, row_group = warp / k;
    const int units = h.cols / Unit<W>::kElements;
    const int begin = rows * blockIdx.x / gridDim.x, end = rows * (blockIdx.x + 1) / gridDim.x;
    // Before the wait (pdl.cuh): weights and biases, constant during a step; choices and residual,
    // complete because the predecessor (glu.cu with experts) releases its dependents only after its
    // own wait.
    const Choice choice = choices.choice(blockIdx.y, j);
    const u32 expert = choice.expert;
    int row = begin + row_group;
    WeightFragment<W, 1, UNROLL_K> fragment;
    const auto span_from = [&](int first) -> RowSpan {
        return {planes, planes, (expert * rows + first) * units, end - first, units, 0, 1};
    };
    const bool active = row_group < row_groups;
    const auto computes = [&](int at) { return active && at < end; };
    if (computes(row)) fragment.load_first(span_from(row));
    const auto load_bias = [&](int at) { return computes(at) && bias ? bias[(size_t)expert * rows + at] : 0.f; };
    const auto load_residual = [&](int at) {
        return computes(at) && j == 0 && residual ? residual[(size_t)blockIdx.y * rows + at] : 0.f;
    };
    float next_bias = load_bias(row), next_residual = load_residual(row);
    StagedRows x;
    launch_dependents();
    grid_dependency_wait();
    stage<kReadsQ8<W>, !kReadsQ8<W>>(h, blockIdx.y * k, k, shared, x);
    for (int at = begin, buffer = 0; at < end; at += row_groups, row += row_groups, buffer ^= 1) {
        float sums[1] = {};
        const float row_bias = next_bias, row_residual = next_residual;
        if (computes(row)) fragment.accumulate(sums, span_from(row), x.row(j));
        if (computes(row + row_groups)) fragment.load_first(span_from(row + row_groups));
        next_bias = load_bias(row + row_groups), next_residual = load_residual(row + row_groups);
        warp_sum_rows(sums);
        if (lane == 0) partial[buffer][warp] = __fmul_rn(choice.weight, __fadd_rn(sums[0], row_bias));
        __syncthreads();
        if (!computes(row) || j != 0 || lane != 0) continue;
        float y = row_residual;
        for (int i = 0; i < k; ++i) y = __fadd_rn(y, partial[buffer][warp + i]);
        out[(size_t)blockIdx.y * rows + row] = y;
    }
}
