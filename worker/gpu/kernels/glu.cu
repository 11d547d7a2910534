// Decode: h[t, j] = gated(W_gate·n[t] + b_gate, W_up·n[t] + b_up): norm, both products and the gate
// in one launch.
//
// For a dense FFN, or for each of the k experts of a token (expert_choice.cuh; k = 1 for a dense
// FFN).
// Shapes: W [E, rows, cols] in planes, types G (gate) and U (up); biases [E, rows] f32 or null; h
// [T·k, rows] as f32 and as Q8 blocks (q and meta are null unless rows is a multiple of 32). n is
// staged by each block (stage_activations.cuh).
// Grid: x over ⌈rows/32⌉, y over T·k; 32·WARPS threads. A block computes 32 adjacent elements of
// one h, so that it can store them as one Q8 block; a warp computes 32/WARPS of them, that is twice
// as many rows in the order gate, up, gate, up, TILE_M at a time. WARPS is 16 for a dense FFN, 8
// for experts: they have many blocks, and small ones end closer together. Experts' weights load
// only after the wait, so long rows of both matrices are in flight together.
// Alignment: planes and x 16 bytes. Dynamic shared memory: the staged row. Bytes: the weights of
// each chosen expert once a token, 16-byte loads, TILE_M·UNROLL_K of them in flight a lane.
// Order and rounding: vec_dot.cuh, then fma(sum, 1/rms, bias), then gated.cuh.
// Twins: `norm_glu`, `experts_glu` in worker/cpu/ops.py; tests/quantized_ops.py. Launcher:
// worker/gpu/matvec.py.
#define WEIGHTS_EVICT_FIRST
#include "vec_dot.cuh"
#include "pdl.cuh"
#include "gated.cuh"
#include "expert_choice.cuh"
#include "glu_params.cuh"

constexpr int kElementsPerBlock = GLU_ELEMENTS;  // one Q8 block

// Blocks of a multiprocessor: 64 registers a thread, for experts with a larger tile 80.
__host__ __device__ constexpr int blocks_of(int warps, int tile) { return warps < kWarps && tile > 4 ? 3 : 32 / warps; }

template <int WARPS, int TILE_M, int UNROLL_K, class G, class U = G, bool GELU = false>
__global__ void __launch_bounds__(32 * WARPS, blocks_of(WARPS, TILE_M * UNROLL_K))
    glu(const Branch gate, const Branch up, const InputRows input, const Gate activation,
        const ExpertChoices choices, const int rows, const Hidden out) {
    extern __shared__ __align__(16) u8 shared[];
    constexpr int kElements = kElementsPerBlock / WARPS, kWarpRows = 2 * kElements;
    __shared__ float row_sums[WARPS][kWarpRows], biases[2][kElementsPerBlock];
    constexpr bool kAlike = kSame<G, U>, kExperts = WARPS != kWarps;
    static_assert(kAlike || TILE_M == 1, "rows of two types are computed one by one");
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first = kElementsPerBlock * blockIdx.x + kElements * warp;
    const int column = kElementsPerBlock * blockIdx.x + lane;  // the element that this lane of warp 0 stores
    const int g_units = input.cols / Unit<G>::kElements, u_units = input.cols / Unit<U>::kElements;
    u32 expert = 0;
    WeightFragment<G, TILE_M, UNROLL_K, (TILE_M > 1)> weights;
    const auto span_of = [&](int v, int units) -> RowSpan {
        const int row = first + v / 2;
        const Planes planes = TILE_M == 1 && v % 2 ? up.planes : gate.planes;
        return {planes, up.planes, (expert * rows + row) * units, rows - row, units, 0, 1};
    };
    const auto load_first = [&](int v) {
        if (kAlike) weights.load_first(span_of(v, g_units));
    };
    const auto load_biases = [&]() {
        if (warp != 0 || column >= rows) return;
        biases[0][lane] = gate.bias ? gate.bias[(size_t)expert * rows + column] : 0.f;
        biases[1][lane] = up.bias ? up.bias[(size_t)expert * rows + column] : 0.f;
    };
    // Before the wait (pdl.cuh): weights of a dense FFN and norm weights, constant during a step;
    // with logits x, complete because the predecessor (the router) releases its dependents only
    // after its own wait.
    if (!kExperts) load_first(0);
    prefetch_norm(input);
    if (!kExperts) {
        launch_dependents();
        grid_dependency_wait();
        load_biases();
    } else if (choices.experts) {
        grid_dependency_wait();
    }
    StagedRows x;
    const int t = kExperts ? blockIdx.y / choices.k : blockIdx.y;
    const float factor =
        stage<kReadsQ8<G> || kReadsQ8<U>, !kReadsQ8<G> || !kReadsQ8<U>, WARPS>(input, t, 1, shared, x);
    if (kExperts) {
        // The dependent (experts_add.cu) reads the choices before its own wait: they must be
        // complete before it starts.
        grid_dependency_wait();
        expert = choices.expert(t, blockIdx.y % choices.k);
        load_first(0);
        load_biases();
    }
#pragma unroll 1
    for (int v = 0; v < kWarpRows; v += TILE_M) {
        float sums[TILE_M] = {};
        if constexpr (kAlike) {
            weights.accumulate(sums, span_of(v, g_units), x);
            if (v + TILE_M < kWarpRows) load_first(v + TILE_M);
        } else if (v % 2) {
            WeightFragment<U, TILE_M, UNROLL_K> up_weights;
            up_weights.load_first(span_of(v, u_units));
            up_weights.accumulate(sums, span_of(v, u_units), x);
        } else {
            weights.load_first(span_of(v, g_units));
            weights.accumulate(sums, span_of(v, g_units), x);
        }
        warp_sum_rows(sums);
#pragma unroll
        for (int r = 0; r < TILE_M; ++r)
            if (lane == r) row_sums[warp][v + r] = sums[r];
    }
    __syncthreads();
    if (warp != 0) return;
    const float* pair = row_sums[lane / kElements] + 2 * (lane % kElements);
    const bool valid = column < rows;
    const float h = valid ? gated<GELU>(__fmaf_rn(pair[0], factor, biases[0][lane]),
                                        __fmaf_rn(pair[1], factor, biases[1][lane]), activation)
                          : 0.f;
    const size_t row = blockIdx.y;
    if (valid) out.x[row * rows + column] = h;
    if (out.q) store_quantized_lane(h, column, rows, out.q + row * rows, out.meta + row * (rows / 32));
}
