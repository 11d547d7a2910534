// Decode of several rows: norm and Q8 blocks of each input row, once for all blocks of a product.
//
//     n = x·weight (or x), stored as Q8 blocks, as f32, or as both; factor = 1/sqrt(mean(x²) + eps)
// Shapes: x [R, cols] f32; q, meta as in q8_activations.cuh; plain [R, cols] f32; factor [R] f32,
// written only with a norm. Q8 blocks need cols to be a multiple of 32, f32 a multiple of 8.
// `quantize_tiles` stores Q8 tiles (q8_tiles.cuh) instead, with zeros in rows R to the tile's end.
// A warp takes 256 columns at a time, eight a lane, and stores them from registers. Grid: (R, or
// the rows of all tiles; with a norm 1, else any number), 32·n threads, n ≤ WARPS; with a norm
// n = min(WARPS, cols / 256 rounded up), which gives the order of the sum of squares.
// Alignment: 16 bytes. Bytes: 4 read and 1.25 to 5.25 written an element.
// The same bits as in a product that stages its own input (stage_activations.cuh) with WARPS warps.
// Twin: `quantize` in tests/quantized_ops.py. Launcher: worker/gpu/activations.py.
#include "pdl.cuh"
#include "q8_tiles.cuh"
#include "stage_activations.cuh"

constexpr int kOfWarp = 256;  // columns

// Call store(v, column) for eight columns a lane of all columns of a row, in whole warps, and write
// the row's factor. `valid`: the row exists; otherwise v is zeros.
template <int WARPS, class Store>
__device__ __forceinline__ void for_row(const InputRows& rows, int row, bool valid, float* factor, Store store) {
    __shared__ float warp_squares[WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, cols = rows.cols;
    const float4* const x = reinterpret_cast<const float4*>(rows.x + (size_t)row * cols);
    const float4* const weight = reinterpret_cast<const float4*>(rows.norm);
    const int step = kOfWarp * warps * gridDim.y;
    int column = kOfWarp * (warps * blockIdx.y + warp) + 8 * lane;
    float4 w[2] = {};
    const auto load_weights = [&] {
        if (weight && column < cols) w[0] = __ldg(weight + column / 4), w[1] = __ldg(weight + column / 4 + 1);
    };
    load_weights();  // constant during a step (pdl.cuh)
    launch_dependents();
    grid_dependency_wait();
    float squares = 0.f;
#pragma unroll 1
    for (; column - 8 * lane < cols; column += step, load_weights()) {
        float4 v[2] = {};
        if (valid && column < cols) v[0] = x[column / 4], v[1] = x[column / 4 + 1];
        if (weight) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                squares = __fadd_rn(squares, sum_of_squares(v[j]));
                v[j] = make_float4(__fmul_rn(v[j].x, w[j].x), __fmul_rn(v[j].y, w[j].y), __fmul_rn(v[j].z, w[j].z),
                                   __fmul_rn(v[j].w, w[j].w));
            }
        }
        store(v, column);
    }
    if (!weight) return;
    squares = warp_sum(squares);
    if (lane == 0) warp_squares[warp] = squares;
    __syncthreads();
    if (warp) return;
    const float all = warp_sum<WARPS>(lane % WARPS < warps ? warp_squares[lane % WARPS] : 0.f);
    if (lane == 0 && valid) factor[row] = rsqrtf(__fadd_rn(__fdiv_rn(all, (float)cols), rows.eps));
}

template <bool STORE_Q8, bool STORE_F32, int WARPS>
__global__ void __launch_bounds__(32 * WARPS)
    quantize_rows(const InputRows rows, u8* q, Meta* meta, float* plain, float* factor) {
    const int row = blockIdx.x, cols = rows.cols;
    for_row<WARPS>(rows, row, true, factor, [&](const float4 (&v)[2], int column) {
        if (STORE_F32 && column < cols) {
            float4* const to = reinterpret_cast<float4*>(plain + (size_t)row * cols + column);
            to[0] = v[0], to[1] = v[1];
        }
        if (STORE_Q8) store_quantized(v, column, cols, q + (size_t)row * cols, meta + (size_t)row * (cols / 32));
    });
}

template <int WARPS>
__global__ void __launch_bounds__(32 * WARPS)
    quantize_tiles(const InputRows rows, const Q8Tiles tiles, int count, float* factor) {
    const int row = blockIdx.x;
    for_row<WARPS>(rows, row, row < count, factor, [&](const float4 (&v)[2], int column) {
        const Q8Quads<2> codes(v, column < rows.cols);
        tiles.store_eight(codes, row, column, column < rows.cols);
    });
}
