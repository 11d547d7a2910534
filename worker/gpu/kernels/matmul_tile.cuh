// Weights and results of a warp's tile of a prefill product, for matmul.cu and those with `wgmma`.
//
// A warp computes FRAGS_M fragments of 16 rows; a lane's rows are those of its fragments of A and
// of the sum (mma.cuh).
#pragma once
#include "matmul_params.cuh"
#include "fragments.cuh"
#include "split_k.cuh"

// The row of weights that a warp's place `at` computes: with GLU the column of h that is stored
// there, so that a warp's results are adjacent.
template <int GLU>
__device__ __forceinline__ int row_at(int at) {
    return GLU ? fragment_column(at) : at;
}

// Loads of a lane's rows of weights, two rows for each fragment of 16: where they begin, and one
// unit of each.
template <class Block, int FRAGS_M, int GLU>
struct WeightIterator {
    static constexpr int kUnits = 32 / Unit<Block>::kElements;  // units of a lane's 32 columns of a step
    u32 rows[2 * FRAGS_M], slices;

    __device__ __forceinline__ WeightIterator(const Projection* projections, int cols, int expert, int row0)
        : slices(cols / 32) {
#pragma unroll
        for (int i = 0; i < 2 * FRAGS_M; ++i) {
            const int row = row_at<GLU>(row0 + 8 * (GLU ? i % FRAGS_M : i) + threadIdx.x % 32 / 4);
            rows[i] = ((u32)expert * projections->rows + min(row, projections->rows - 1)) * slices;
        }
    }
    // The lane's two rows of a dense matrix.
    __device__ __forceinline__ WeightIterator(int cols, int2 row) : slices(cols / 32) {
        static_assert(FRAGS_M == 1 && !GLU, "two rows");
        rows[0] = row.x * slices, rows[1] = row.y * slices;
    }
    // Index of unit k of the lane's columns of a step; past the last column x is zero, so any
    // weights will do.
    __device__ __forceinline__ u32 unit(int i, int step, int k) const {
        return (rows[i] + min(4 * step + threadIdx.x % 4, slices - 1)) * kUnits + k;
    }
    __device__ __forceinline__ void load(const Projection* projections, int step, int k,
                                         Unit<Block> (&units)[2 * FRAGS_M]) const {
#pragma unroll
        for (int i = 0; i < 2 * FRAGS_M; ++i)
            units[i].load(projections[GLU ? i / FRAGS_M : 0].planes, unit(i, step, k));
    }
    // Shift the queue of AHEAD prefetched units by one: the first becomes `current`, the last is
    // loaded.
    template <int AHEAD>
    __device__ __forceinline__ void advance(const Projection* projections, int step, int k,
                                            Unit<Block> (&current)[2 * FRAGS_M],
                                            Unit<Block> (&prefetched)[AHEAD][2 * FRAGS_M]) const {
#pragma unroll
        for (int i = 0; i < 2 * FRAGS_M; ++i) {
            current[i] = prefetched[0][i];
#pragma unroll
            for (int a = 1; a < AHEAD; ++a) prefetched[a - 1][i] = prefetched[a][i];
        }
        load(projections, step, k, prefetched[AHEAD - 1]);
    }
};

// Epilogue: write y, or with GLU h, of REDUCED_N tokens from `token0` on. A lane holds rows lane/4,
// lane/4 + 8, … of two adjacent tokens. h has zeros where there is no column.
template <int TILE_N, int FRAGS_M, int REDUCED_N, int GLU>
__device__ __forceinline__ void write(const MatmulParams& p, const Projection* projections,
                                      const TokenTile<TILE_N>& tokens, int token0, int row0,
                                      const Accumulator<FRAGS_M, REDUCED_N>& sums) {
    constexpr int kRows = GLU ? FRAGS_M : 2 * FRAGS_M, kUp = GLU ? FRAGS_M : 0;
    const int lane = threadIdx.x % 32, rows = projections->rows, r = row0 + lane / 4;
    const int valid_rows = (rows - r + 7) / 8;  // of r, r + 8, …
    const auto exists = [&](int i) { return GLU ? row_at<GLU>(r + 8 * i) < rows : i < valid_rows; };
    float bias[2 * FRAGS_M];
#pragma unroll
    for (int i = 0; i < 2 * FRAGS_M; ++i) {
        const float* from = projections[i / kRows].bias;
        const size_t at = (size_t)tokens.tile.expert * rows + row_at<GLU>(r + i % kRows * 8);
        bias[i] = from && exists(i % kRows) ? from[at] : 0.f;
    }
#pragma unroll
    for (int n = 0; n < REDUCED_N / 8; ++n) {
        float residual[2][kRows];  // all loads before the first store, so that they overlap
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int token = token0 + 8 * n + lane % 4 * 2 + j;
            const float* from = p.residual + (size_t)tokens.slots[token] * rows + r;
#pragma unroll
            for (int i = 0; i < kRows; ++i) residual[j][i] = p.residual && i < valid_rows ? from[8 * i] : 0.f;
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int token = token0 + 8 * n + lane % 4 * 2 + j;
            const bool valid = token < tokens.tile.count;
            const float s = tokens.scales[token];
            float* to = projections->out + (size_t)tokens.slots[token] * rows + r;
            u16* h = reinterpret_cast<u16*>(projections->out) + (size_t)tokens.slots[token] * padded(rows) + r;
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                float y = __fmaf_rn(sums[i / 2][n][i % 2 * 2 + j], s, bias[i]);
                if (GLU) y = gated<GLU == kGelu>(y, __fmaf_rn(sums[(kUp + i) / 2][n][(kUp + i) % 2 * 2 + j], s, bias[kUp + i]), p.gate);
                // Not contracted: with GLU the residual is zero, which makes -0 of an underflow 0, as
                // in write_staged.
                y = __fadd_rn(y, residual[j][i]);
                if constexpr (GLU > 0) {
                    if (valid) h[8 * i] = float_to_half(exists(i) ? y * tokens.h_inverses[token] : 0.f);
                } else {
                    if (valid && i < valid_rows) to[8 * i] = y;
                }
            }
        }
    }
}
