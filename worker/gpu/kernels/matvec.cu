// Decode: y_j[t] = W_j·x[t] + b_j + residual[t], up to three matrices of one input in one launch (q, k and v, say).
//
// A block is 8 warps. `parts` of them (a power of two, fixed for a matrix by its shape) share ROWS rows of one matrix
// and their sums are added in order; blocks go over the rows of the first matrix, then of the second and third, grid y
// over tokens. Weights are read once a token, with 16-byte loads; activations come from cache. A, B, C: the matrices'
// block types. Reads planes (codes.cuh) and activations (quantized.cuh); rows of y are of the matrix's own width.
// Twin: `norm_linear` and `linear_add` in worker/cpu/ops.py without the norm; worker/cpu/quantized.py.
#include "dots.cuh"

constexpr int kWarps = 8;

struct Matrix {
    Planes planes;
    const float* bias;      // [rows] or null
    const float* residual;  // [T, rows] or null
    float* out;             // [T, rows]
    int rows, first_block;
};

template <class Block, int ROWS>
__device__ __forceinline__ void product(const Matrix& m, const Activations& x, int row_units, int parts) {
    __shared__ float partial[kWarps][ROWS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = warp & (parts - 1);
    const int group = (blockIdx.x - m.first_block) * (kWarps / parts) + warp / parts, first = group * ROWS;
    float sums[ROWS] = {};
    if (first < m.rows) add_dots<Block, ROWS>(sums, m.planes, 0, first, m.rows - 1, x, row_units, part, parts);
    sum_lanes(sums);
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
        if (lane == r) partial[warp][r] = sums[r];
    __syncthreads();
    const int row = first + lane;
    if (part != 0 || lane >= ROWS || row >= m.rows) return;
    float y = partial[warp][lane];
    for (int i = 1; i < parts; ++i) y += partial[warp + i][lane];
    const size_t at = (size_t)blockIdx.y * m.rows + row;
    if (m.bias) y += m.bias[row];
    if (m.residual) y += m.residual[at];
    m.out[at] = y;
}

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

template <int ROWS, class A, class B = A, class C = B>
__global__ void __launch_bounds__(32 * kWarps)
    matvec(const Matrix a, const Matrix b, const Matrix c, const Activations x, const int parts) {
    const Activations input = x.row(blockIdx.y);
    const int block = blockIdx.x;
    if constexpr (kSame<A, B> && kSame<B, C>) {
        Matrix m = a;
        if (block >= b.first_block) m = b;
        if (block >= c.first_block) m = c;
        product<A, ROWS>(m, input, x.cols / Unit<A>::kElements, parts);
    } else if (block < b.first_block) {
        product<A, ROWS>(a, input, x.cols / Unit<A>::kElements, parts);
    } else if (block < c.first_block) {
        product<B, ROWS>(b, input, x.cols / Unit<B>::kElements, parts);
    } else {
        product<C, ROWS>(c, input, x.cols / Unit<C>::kElements, parts);
    }
}
