// Decode of several rows: of each row the RMSNorm as Q8 blocks for the experts, and the router's
// choice, in one launch.
//
// Shapes: x [R, cols] f32; the router W [E, cols] in planes of type W, bias [E] f32 or null. Out: q
// and meta as in q8_activations.cuh, factor [R] f32, experts [R, k] i32 and weights [R, k] f32; k ≤
// 32.
// Grid: a block of 512 threads a row. Alignment: planes, x and norm 16 bytes. Dynamic shared
// memory: the staged row, then E·(split_k + 1) floats. Bytes: the router once a row, from L2.
// Order and rounding: the bits of matvec.cu followed by route.cu. `factor` is 1/rms as 8 warps add
// the squares (glu.cu for experts), the router's factor as 16 warps do (matvec.cu).
// Twin: `norm_route` in worker/cpu/ops.py; tests/quantized_ops.py. Launcher:
// worker/gpu/decode_experts.py.
#include "vec_dot.cuh"
#include "pdl.cuh"
#include "top_k.cuh"

struct NormedRows {
    u8* q;
    Meta* meta;
    float* factor;
};

struct Choices {
    int* experts;
    float* weights;
    int k;
};

// 1/rms of a row, with the squares added as `stage` does with WARPS warps. Called by all threads.
template <int WARPS>
__device__ __forceinline__ float factor_of(const InputRows& input, int row) {
    __shared__ float warp_squares[WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float4* x = reinterpret_cast<const float4*>(input.x + (size_t)row * input.cols);
    if (warp < WARPS) {
        float squares = 0.f;
        for (int i = 64 * warp + 2 * lane; i < input.cols / 4; i += 64 * WARPS) {
            squares = __fadd_rn(squares, sum_of_squares(x[i]));
            squares = __fadd_rn(squares, sum_of_squares(x[i + 1]));
        }
        squares = warp_sum(squares);
        if (lane == 0) warp_squares[warp] = squares;
    }
    __syncthreads();
    const float mean = __fdiv_rn(warp_sum<WARPS>(warp_squares[lane % WARPS]), (float)input.cols);
    return rsqrtf(__fadd_rn(mean, input.eps));
}

template <class W>
__global__ void __launch_bounds__(kThreads)
    route_rows(const InputRows input, const Planes planes, const float* __restrict__ bias, const int n_experts,
               const int split_k, const NormedRows out, const Choices choices) {
    extern __shared__ __align__(16) u8 shared[];
    constexpr int kTileM = 8, kUnroll = kReadsQ8<W> ? 1 : 2;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = blockIdx.x, cols = input.cols;
    const int split = warp & (split_k - 1), row_units = cols / Unit<W>::kElements;
    float* const partial = reinterpret_cast<float*>(shared + cols * 5 / 4 + (kReadsQ8<W> ? 0 : cols * 4));
    float* const logits = partial + n_experts * split_k;
    int expert = warp / split_k * kTileM;
    const int step = kWarps / split_k * kTileM;
    WeightFragment<W, kTileM, kUnroll> fragment;
    const auto span_from = [&](int first) -> RowSpan {
        return {planes, planes, (u32)first * row_units, n_experts - first, row_units, split, split_k};
    };
    // Before the wait (pdl.cuh): weights and norm weights, constant during a step.
    if (expert < n_experts) fragment.load_first(span_from(expert));
    prefetch_norm(input);
    launch_dependents();
    grid_dependency_wait();
    StagedRows x;
    const float factor = stage<true, !kReadsQ8<W>>(input, row, 1, shared, x);
    const float experts_factor = factor_of<EXPERT_WARPS>(input, row);
    if (threadIdx.x == 0) out.factor[row] = experts_factor;
    for (int i = threadIdx.x; i < cols / 16; i += kThreads)
        reinterpret_cast<uint4*>(out.q + (size_t)row * cols)[i] = reinterpret_cast<const uint4*>(x.q)[i];
    for (int i = threadIdx.x; i < cols / 32; i += kThreads) out.meta[(size_t)row * (cols / 32) + i] = x.meta[i];
    for (; expert < n_experts; expert += step) {
        float sums[kTileM] = {};
        fragment.accumulate(sums, span_from(expert), x);
        if (expert + step < n_experts) fragment.load_first(span_from(expert + step));
        warp_sum_rows(sums);
#pragma unroll
        for (int r = 0; r < kTileM; ++r)
            if (lane == r && expert + r < n_experts) partial[(expert + r) * split_k + split] = sums[r];
    }
    __syncthreads();
    for (int e = threadIdx.x; e < n_experts; e += kThreads) {
        float y = partial[e * split_k];
        for (int i = 1; i < split_k; ++i) y = __fadd_rn(y, partial[e * split_k + i]);
        logits[e] = __fmaf_rn(y, factor, bias ? bias[e] : 0.f);
    }
    __syncthreads();
    if (warp != 0) return;
    const Choice choice = choose(logits, n_experts, choices.k);
    if (lane >= choices.k) return;
    choices.experts[(size_t)row * choices.k + lane] = choice.expert;
    choices.weights[(size_t)row * choices.k + lane] = choice.weight;
}
