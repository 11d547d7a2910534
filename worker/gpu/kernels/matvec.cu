// Decode: y_j[t] = W_j·n[t] + b_j + residual[t], up to three matrices of one input in one launch (q, k and v, say).
//
// n is the input as it is or its RMSNorm, staged in shared memory by each block (staged.cuh). A matrix has `blocks` blocks,
// each a run of its rows: 16 warps, of which `parts` (a power of two, fixed for a matrix by its shape) share ROWS rows and
// add their sums in order. Grid x over the blocks of the first matrix, then of the second and third, y over tokens.
// Weights are read once a token, 16 bytes a lane and ROWS·DEPTH such loads in flight, the first of them before the input
// is there (pdl.cuh). A, B, C: the matrices' types.
// Twin: `norm_linear` and `linear_add` in worker/cpu/ops.py; worker/cpu/quantized.py.
#include "dots.cuh"
#include "pdl.cuh"

struct Matrix {
    Planes planes;
    const float* bias;      // [rows] or null
    const float* residual;  // [T, rows] or null
    float* out;             // [T, rows]
    int rows, first_block, blocks;
};

template <class Block, int ROWS, int DEPTH, bool BLOCKS, bool PLAIN>
__device__ __forceinline__ void product(const Matrix& m, const Rows& input, int parts, u8* shared) {
    __shared__ float partial[2][kWarps][ROWS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, slots = kWarps / parts, slot = warp / parts;
    const int part = warp & (parts - 1), row_units = input.cols / Unit<Block>::kElements;
    const int block = blockIdx.x - m.first_block;
    const int begin = (u32)m.rows * block / (u32)m.blocks, end = (u32)m.rows * (block + 1) / (u32)m.blocks;
    const float* residual = m.residual ? m.residual + (size_t)blockIdx.y * m.rows : nullptr;
    int row = begin + slot * ROWS;
    Tile<Block, ROWS, DEPTH> tile;
    const auto run_from = [&](int first) -> Run {
        return {m.planes, m.planes, (u32)first * row_units, end - first, row_units, part, parts};
    };
    const auto writes = [&](int first) { return part == 0 && lane < ROWS && first + lane < end; };
    const auto added = [&](int first) {
        float sum = 0.f;
        if (writes(first) && m.bias) sum = m.bias[first + lane];
        if (writes(first) && residual) sum += residual[first + lane];
        return sum;
    };
    if (row < end) tile.begin(run_from(row));
    fetch_norm(input);
    Activations x;
    launch_dependents();
    grid_dependency_wait();
    float next = added(row);
    const float factor = stage<BLOCKS, PLAIN>(input, blockIdx.y, 1, shared, x);
    for (int at = begin, turn = 0; at < end; at += slots * ROWS, row += slots * ROWS, turn ^= 1) {
        const float more = next;
        float sums[ROWS] = {};
        if (row < end) tile.add(sums, run_from(row), x);
        if (row + slots * ROWS < end) tile.begin(run_from(row + slots * ROWS));
        next = added(row + slots * ROWS);
        sum_lanes(sums);
        float y = sums[0];
#pragma unroll
        for (int r = 1; r < ROWS; ++r) y = lane == r ? sums[r] : y;
        if (parts > 1) {
            if (lane < ROWS) partial[turn][warp][lane] = y;
            __syncthreads();
            if (writes(row))
#pragma unroll 4
                for (int i = 1; i < parts; ++i) y += partial[turn][warp + i][lane];
        }
        if (writes(row)) m.out[(size_t)blockIdx.y * m.rows + row + lane] = y * factor + more;
    }
}

template <int ROWS, int DEPTH, class A, class B = A, class C = B>
__global__ void __launch_bounds__(kThreads, 2)
    matvec(const Matrix a, const Matrix b, const Matrix c, const Rows input, const int parts) {
    extern __shared__ __align__(16) u8 shared[];
    constexpr bool kBlocks = kReadsBlocks<A> || kReadsBlocks<B> || kReadsBlocks<C>;
    constexpr bool kPlain = !kReadsBlocks<A> || !kReadsBlocks<B> || !kReadsBlocks<C>;
    const int block = blockIdx.x;
    if constexpr (kSame<A, B> && kSame<B, C>) {
        Matrix m = a;
        if (block >= b.first_block) m = b;
        if (block >= c.first_block) m = c;
        product<A, ROWS, DEPTH, kBlocks, kPlain>(m, input, parts, shared);
    } else if (block < (kSame<A, B> ? c : b).first_block) {
        Matrix m = a;
        if (kSame<A, B> && block >= b.first_block) m = b;
        product<A, ROWS, DEPTH, kBlocks, kPlain>(m, input, parts, shared);
    } else if (!kSame<A, B> && block < c.first_block) {
        product<B, ROWS, DEPTH, kBlocks, kPlain>(b, input, parts, shared);
    } else {
        product<C, ROWS, DEPTH, kBlocks, kPlain>(c, input, parts, shared);
    }
}
