// Parameters, outputs and epilogues of the decode products on the tensor cores (matvec_mma.cu,
// matvec_mma_wide.cu).
#pragma once
#include "gated.cuh"
#include "matvec_mma.cuh"

struct MmaMatrix {
    Planes planes;
    const float* bias;      // [rows] or null
    const float* residual;  // [T, rows] or null
    float* out;             // [T, rows]; with GATED h, in the first matrix
    int rows, first_tile;   // the row tiles of a matrix follow those of the one before
};

struct MmaParams {
    MmaMatrix matrices[3];
    Q8Tiles x;
    const float* factor;  // [T] or null (1)
    Gate gate;
    Q8Tiles h;  // h as Q8 tiles, or null pointers
    int tokens, tiles, split_k, last_block;
};

// A row of a tile of ROWS: its matrix, and its row there (which may be past the last one). With GATED
// 8 rows of the first matrix and 8 of the second follow each other.
template <int ROWS, bool GATED>
struct TileRow {
    int matrix, row;
    __device__ __forceinline__ TileRow(const MmaParams& p, int tile, int r) {
        if (GATED) {
            matrix = r / 8 % 2, row = ROWS / 2 * tile + r / 16 * 8 + r % 8;
        } else {
            matrix = (tile >= p.matrices[1].first_tile) + (tile >= p.matrices[2].first_tile);
            row = ROWS * (tile - p.matrices[matrix].first_tile) + r;
        }
    }
};

// A lane's sums in shared memory, [warp][NT][lane][4], gate and up of an element adjacent.
template <int NT>
struct StoredSums {
    float4* at;
    __device__ __forceinline__ explicit StoredSums(float* sums)
        : at(reinterpret_cast<float4*>(sums) + threadIdx.x / 32 * NT * 32 + threadIdx.x % 32) {}
    __device__ __forceinline__ void store(const Sums<NT>& v) const {
#pragma unroll
        for (int n = 0; n < NT; ++n) at[n * 32] = make_float4(v[n][0], v[n][2], v[n][1], v[n][3]);
    }
    __device__ __forceinline__ void add_to(Sums<NT>& v) const {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const float4 f = at[n * 32];
            v[n][0] = __fadd_rn(f.x, v[n][0]), v[n][2] = __fadd_rn(f.y, v[n][2]);
            v[n][1] = __fadd_rn(f.z, v[n][1]), v[n][3] = __fadd_rn(f.w, v[n][3]);
        }
    }
};

// The sums of 16 rows and 8·NT tokens that WARPS warps have stored. Of the 4·NT sums of a lane a thread
// finishes SHARE, from `first` on.
template <int WARPS, int NT, int SHARE>
struct FinishedSums {
    int first, lane;
    __device__ __forceinline__ explicit FinishedSums(int warp) : first(warp * SHARE), lane(threadIdx.x % 32) {}
    __device__ __forceinline__ bool any() const { return first < 4 * NT; }
    __device__ __forceinline__ int row(int k) const { return lane / 4 + (first + k) % 2 * 8; }
    __device__ __forceinline__ int token(int k) const {
        const int e = first + k, n = e / 4;
        return n / 2 * 16 + lane % 4 * 4 + n % 2 + e / 2 % 2 * 2;
    }
    // The sum of the WARPS parts: the upper levels of the tree over chains.
    __device__ __forceinline__ void add(const float* sums, float (&total)[SHARE]) const {
        constexpr int kWidth = SHARE < 4 ? SHARE : 4;  // floats of a load
        const float* const from = sums + (first / 4 * 32 + lane) * 4 + first % 4;
#pragma unroll
        for (int k = 0; k < SHARE; k += kWidth) {
            float v[WARPS][kWidth];
#pragma unroll
            for (int w = 0; w < WARPS; ++w) load_floats(from + w * NT * 128 + k / 4 * 128, v[w]);
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
#pragma unroll
                for (int step = WARPS / 2; step; step /= 2)
#pragma unroll
                    for (int w = 0; w < step; ++w) v[w][i] = __fadd_rn(v[w][i], v[w + step][i]);
                total[k + i] = v[0][i];
            }
        }
    }

private:
    static __device__ __forceinline__ void load_floats(const float* from, float (&to)[4]) {
        unpack4(*reinterpret_cast<const float4*>(from), to);
    }
    static __device__ __forceinline__ void load_floats(const float* from, float (&to)[2]) {
        const float2 f = *reinterpret_cast<const float2*>(from);
        to[0] = f.x, to[1] = f.y;
    }
    static __device__ __forceinline__ void load_floats(const float* from, float (&to)[1]) { to[0] = *from; }
};

// Write finished sums: those of rows first_row + sums.row(k) of a tile of ROWS.
template <int ROWS, class Finished, int SHARE>
__device__ __forceinline__ void write_rows(const MmaParams& p, int tile, int first_row, int first_token,
                                           const Finished& sums, const float (&y)[SHARE]) {
    if (!sums.any()) return;
#pragma unroll
    for (int k = 0; k < SHARE; ++k) {
        const TileRow<ROWS, false> r(p, tile, first_row + sums.row(k));
        const MmaMatrix& m = p.matrices[r.matrix];
        const int t = first_token + sums.token(k);
        if (r.row >= m.rows || t >= p.tokens) continue;
        float addend = m.bias ? m.bias[r.row] : 0.f;
        if (m.residual) addend = __fadd_rn(addend, m.residual[(size_t)t * m.rows + r.row]);
        m.out[(size_t)t * m.rows + r.row] = __fmaf_rn(y[k], p.factor ? p.factor[t] : 1.f, addend);
    }
}

// Call use(row, token, h) for the elements of h of a thread, which are zero where rows or tokens end.
template <int ROWS, class Finished, int SHARE, class Use>
__device__ __forceinline__ void each_gated(const MmaParams& p, int tile, int first_row, int first_token,
                                           const Finished& sums, const float (&y)[SHARE], Use use) {
    if (!sums.any()) return;
    const float* const biases[2] = {p.matrices[0].bias, p.matrices[1].bias};
#pragma unroll
    for (int k = 0; k < SHARE; k += 2) {
        const int row = TileRow<ROWS, true>(p, tile, first_row + sums.row(k)).row, t = first_token + sums.token(k);
        const bool valid = row < p.matrices[0].rows && t < p.tokens;
        const float factor = valid && p.factor ? p.factor[t] : 1.f;
        const float gate = __fmaf_rn(y[k], factor, valid && biases[0] ? biases[0][row] : 0.f);
        const float up = __fmaf_rn(y[k + 1], factor, valid && biases[1] ? biases[1][row] : 0.f);
        use(row, t, valid ? gated(gate, up, p.gate) : 0.f);
    }
}

template <int ROWS, class Finished, int SHARE>
__device__ __forceinline__ void write_gated(const MmaParams& p, int tile, int first_row, int first_token,
                                            const Finished& sums, const float (&y)[SHARE]) {
    const int rows = p.matrices[0].rows;
    each_gated<ROWS>(p, tile, first_row, first_token, sums, y, [&](int row, int t, float h) {
        if (row < rows && t < p.tokens) p.matrices[0].out[(size_t)t * rows + row] = h;
    });
}
