// Decode of several rows: h[t] = gated(W_gate·n[t] + b_gate, W_up·n[t] + b_up), each weight loaded
// once for T rows.
//
// Shapes: W [rows, cols] in planes, types G (gate) and U (up); biases [rows] f32 or null; n [R,
// cols] prepared (row_tiles.cuh); h [R, rows] as f32 and as Q8 blocks (q and meta are null unless
// rows is a multiple of 32).
// Grid: x over ⌈rows/32⌉, y over ⌈R/T⌉; 32·WARPS threads. A block computes 32 adjacent
// elements of T rows, a warp 32/WARPS of them: the rows of gate and up of ELEMENTS elements
// together.
// Alignment: planes and rows 16 bytes. Dynamic shared memory: T staged rows. Bytes: each weight
// once for T rows.
// Order and rounding: those of glu.cu for every row.
// Twin: `norm_glu` in worker/cpu/ops.py; tests/quantized_ops.py. Launcher: worker/gpu/matvec.py.
#include "row_tiles.cuh"
#include "pdl.cuh"
#include "gated.cuh"
#include "glu_params.cuh"

template <int T, int WARPS, int ELEMENTS, int UNROLL_K, int BLOCKS, class G, class U = G, bool GELU = false>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    glu_rows(const Branch gate, const Branch up, const PreparedRows input, const Gate activation, const int rows,
             const Hidden out) {
    extern __shared__ __align__(16) u8 shared[];
    constexpr int kElements = GLU_ELEMENTS / WARPS;  // of a warp
    static_assert(T <= WARPS, "a warp stores a row");
    constexpr bool kAlike = kSame<G, U>, kQ8 = kReadsQ8<G> || kReadsQ8<U>, kF32 = !kReadsQ8<G> || !kReadsQ8<U>;
    __shared__ float pairs[T][GLU_ELEMENTS][2], factors[T];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first = GLU_ELEMENTS * blockIdx.x + kElements * warp;
    const int g_units = input.cols / Unit<G>::kElements, u_units = input.cols / Unit<U>::kElements;
    const auto span_of = [&](int element, int units, const Planes& planes) -> RowSpan {
        const int row = first + element;
        return {planes, up.planes, (u32)row * units, rows - row, units, 0, 1};
    };
    constexpr int kAtOnce = kAlike ? ELEMENTS : 1, kSums = 2 * kAtOnce;  // a row
    static_assert(T * kSums <= 32 && kElements % kAtOnce == 0, "a lane stores one sum");
    TileFragment<G, kAlike ? kSums : 1, UNROLL_K, T, kAlike> weights;
    // Before the wait (pdl.cuh): weights, constant during a step.
    weights.load_first(span_of(0, g_units, gate.planes));
    launch_dependents();
    grid_dependency_wait();
    const StagedRows x = stage_tile<T, kQ8, kF32, false>(input, T * blockIdx.y, shared, factors);
#pragma unroll 1
    for (int e = 0; e < kElements; e += kAtOnce) {
        float* pair = pairs[0][kElements * warp + e];
        if constexpr (kAlike) {
            float sums[T * kSums] = {};
            weights.accumulate(sums, span_of(e, g_units, gate.planes), x);
            if (e + kAtOnce < kElements) weights.load_first(span_of(e + kAtOnce, g_units, gate.planes));
            const float sum = warp_sum_each(sums);
            constexpr int kLanes = 32 / (T * kSums);
            const int i = lane / kLanes;
            if (lane % kLanes == 0) pair[i / kSums * 2 * GLU_ELEMENTS + i % kSums] = sum;
        } else {
            TileFragment<U, 1, UNROLL_K, T> up_weights;
            float sums[T] = {}, up_sums[T] = {};
            up_weights.load_first(span_of(e, u_units, up.planes));
            weights.accumulate(sums, span_of(e, g_units, gate.planes), x);
            if (e + 1 < kElements) weights.load_first(span_of(e + 1, g_units, gate.planes));
            up_weights.accumulate(up_sums, span_of(e, u_units, up.planes), x);
            const float of_gate = warp_sum_each(sums), of_up = warp_sum_each(up_sums);
            constexpr int kLanes = 32 / T;
            if (lane % kLanes == 0) {
                pair[lane / kLanes * 2 * GLU_ELEMENTS] = of_gate;
                pair[lane / kLanes * 2 * GLU_ELEMENTS + 1] = of_up;
            }
        }
    }
    __syncthreads();
    const int row = T * blockIdx.y + warp, column = GLU_ELEMENTS * blockIdx.x + lane;
    if (warp >= T || row >= input.rows) return;
    const bool valid = column < rows;
    const float factor = factors[warp], *sum = pairs[warp][lane];
    const float b_gate = valid && gate.bias ? gate.bias[column] : 0.f, b_up = valid && up.bias ? up.bias[column] : 0.f;
    const float h =
        valid ? gated<GELU>(__fmaf_rn(sum[0], factor, b_gate), __fmaf_rn(sum[1], factor, b_up), activation) : 0.f;
    if (valid) out.x[(size_t)row * rows + column] = h;
    if (out.q)
        store_quantized_lane(h, column, rows, out.q + (size_t)row * rows, out.meta + (size_t)row * (rows / 32));
}
