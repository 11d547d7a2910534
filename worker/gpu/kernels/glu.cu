// Decode: h[t, j] = gated(W_gate·n[t] + b_gate, W_up·n[t] + b_up): norm, both products and the gate in one launch, of a
// dense FFN or of each of a token's k experts.
//
// A block makes 32 neighbouring elements of one h, so that it can leave them as one 8-bit block beside their f32. Each of its
// WARPS warps takes 32/WARPS of them, which are twice as many rows, in the order gate, up, gate, up and ROWS at a time: 16
// warps of a dense FFN; 8 of experts, whose blocks are many, so that smaller ones end together. Grid x over ⌈rows/32⌉, y over
// T·k; `experts` [T, k] is null for a dense FFN with k = 1, whose first weights are on their way before the input is there
// (pdl.cuh). Biases are [E, rows] or null; q and meta null where rows is no multiple of 32. Reads each chosen expert's
// weights once a token, 16 bytes a lane, ROWS·DEPTH such loads in flight.
// Twins: `norm_glu`, `experts_glu` in worker/cpu/ops.py; worker/cpu/quantized.py.
#include "dots.cuh"
#include "pdl.cuh"
#include "gated.cuh"

struct Branch {
    Planes planes;
    const float* bias;
};

struct Hidden {  // rows [T·k, rows], as f32 and as 8-bit blocks
    float* x;
    u8* q;
    Meta* meta;
};

template <int WARPS, int ROWS, int DEPTH, class G, class U = G>
__global__ void __launch_bounds__(32 * WARPS, 32 / WARPS)
    glu(const Branch gate, const Branch up, const Rows input, const Gate activation, const int* __restrict__ experts,
        const int k, const int rows, const Hidden out) {
    extern __shared__ __align__(16) u8 shared[];
    constexpr int kElements = 32 / WARPS, kRowsOfWarp = 2 * kElements;
    __shared__ float sums_of[WARPS][kRowsOfWarp], biases[2][32];
    constexpr bool kAlike = kSame<G, U>;
    static_assert(kAlike || ROWS == 1, "rows of two types go one by one");
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = 32 * blockIdx.x + kElements * warp;
    const int column = 32 * blockIdx.x + lane;  // the element that this lane of the first warp ends
    const int g_units = input.cols / Unit<G>::kElements, u_units = input.cols / Unit<U>::kElements;
    u32 expert = 0;
    Tile<G, ROWS, DEPTH, (ROWS > 1)> tile;
    const auto run_of = [&](int v, int units) -> Run {
        const int row = first + v / 2;
        const Planes planes = ROWS == 1 && v % 2 ? up.planes : gate.planes;
        return {planes, up.planes, (expert * rows + row) * units, rows - row, units, 0, 1};
    };
    const auto begin = [&](int v) {
        if (kAlike) tile.begin(run_of(v, g_units));
    };
    if (!experts) begin(0);
    fetch_norm(input);
    if (!experts) launch_dependents();  // else the next reads the routes at once
    grid_dependency_wait();
    if (experts) {
        expert = experts[blockIdx.y];
        begin(0);
    }
    if (warp == 0 && column < rows) {
        biases[0][lane] = gate.bias ? gate.bias[(size_t)expert * rows + column] : 0.f;
        biases[1][lane] = up.bias ? up.bias[(size_t)expert * rows + column] : 0.f;
    }
    Activations x;
    const float factor = stage<kReadsBlocks<G> || kReadsBlocks<U>, !kReadsBlocks<G> || !kReadsBlocks<U>, WARPS>(
        input, blockIdx.y / k, 1, shared, x);
#pragma unroll 1
    for (int v = 0; v < kRowsOfWarp; v += ROWS) {
        float sums[ROWS] = {};
        if constexpr (kAlike) {
            tile.add(sums, run_of(v, g_units), x);
            if (v + ROWS < kRowsOfWarp) begin(v + ROWS);
        } else if (v % 2) {
            Tile<U, ROWS, DEPTH> other;
            other.begin(run_of(v, u_units));
            other.add(sums, run_of(v, u_units), x);
        } else {
            tile.begin(run_of(v, g_units));
            tile.add(sums, run_of(v, g_units), x);
        }
        sum_lanes(sums);
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
            if (lane == r) sums_of[warp][v + r] = sums[r];
    }
    __syncthreads();
    if (warp != 0) return;
    const float* of = sums_of[lane / kElements] + 2 * (lane % kElements);
    const bool real = column < rows;
    const float h = real ? gated(of[0] * factor + biases[0][lane], of[1] * factor + biases[1][lane], activation) : 0.f;
    const size_t row = blockIdx.y;
    if (real) out.x[row * rows + column] = h;
    if (out.q) store_quantized_lane(h, column, rows, out.q + row * rows, out.meta + row * (rows / 32));
}
