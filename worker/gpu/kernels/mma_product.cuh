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

// A row of a tile of ROWS: its matrix, and its row there (which may be past the last one). With
// GATED 8 rows of the first matrix and 8 of the second follow each other.
template <int ROWS, int GATED>
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

// The sums of NT MMAs that WARPS warps have stored, 16 rows and 8·TOKENS tokens after another. Of
// the 4·NT sums of a lane a thread finishes SHARE, from `first` on.
template <int WARPS, int NT, int SHARE, int TOKENS = NT>
struct FinishedSums {
    int first, lane;
    __device__ __forceinline__ explicit FinishedSums(int warp) : first(warp * SHARE), lane(threadIdx.x % 32) {}
    __device__ __forceinline__ bool any() const { return first < 4 * NT; }
    __device__ __forceinline__ int row(int k) const { return (first + k) / (4 * TOKENS) * 16 + lane / 4 + (first + k) % 2 * 8; }
    __device__ __forceinline__ int token(int k) const {
        const int e = first + k, n = e / 4 % TOKENS;
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

// Write finished sums: those of rows first_row + sums.row(k) of a tile of ROWS. All loads come
// first, so that they overlap.
template <int ROWS, class Finished, int SHARE>
__device__ __forceinline__ void write_rows(const MmaParams& p, int tile, int first_row, int first_token,
                                           const Finished& sums, const float (&y)[SHARE]) {
    if (!sums.any()) return;
    const MmaMatrix& m = p.matrices[TileRow<ROWS, false>(p, tile, 0).matrix];
    const int row = TileRow<ROWS, false>(p, tile, first_row).row;
    const auto row_of = [&](int k) { return row + sums.row(k); };
    const auto token_of = [&](int k) { return first_token + sums.token(k); };
    const auto valid = [&](int k) { return row_of(k) < m.rows && token_of(k) < p.tokens; };
    const auto offset = [&](int k) { return (size_t)token_of(k) * m.rows + row_of(k); };
    float addend[SHARE], factor[SHARE];
#pragma unroll
    for (int k = 0; k < SHARE; ++k) addend[k] = 0.f, factor[k] = 1.f;
    if (m.bias)
#pragma unroll
        for (int k = 0; k < SHARE; ++k)
            if (valid(k)) addend[k] = m.bias[row_of(k)];
    if (m.residual)
#pragma unroll
        for (int k = 0; k < SHARE; ++k)
            if (valid(k)) addend[k] = __fadd_rn(addend[k], m.residual[offset(k)]);
    if (p.factor)
#pragma unroll
        for (int k = 0; k < SHARE; ++k)
            if (valid(k)) factor[k] = p.factor[token_of(k)];
#pragma unroll
    for (int k = 0; k < SHARE; ++k)
        if (valid(k)) m.out[offset(k)] = __fmaf_rn(y[k], factor[k], addend[k]);
}

// Call use(row, token, h) for the elements of h of a thread, which are zero where rows or tokens
// end.
template <int ROWS, int GATED, class Finished, int SHARE, class Use>
__device__ __forceinline__ void each_gated(const MmaParams& p, int tile, int first_row, int first_token,
                                           const Finished& sums, const float (&y)[SHARE], Use use) {
    if (!sums.any()) return;
    const float* const biases[2] = {p.matrices[0].bias, p.matrices[1].bias};
    const auto row_of = [&](int k) { return TileRow<ROWS, GATED>(p, tile, first_row + sums.row(k)).row; };
    const auto token_of = [&](int k) { return first_token + sums.token(k); };
    const auto valid = [&](int k) { return row_of(k) < p.matrices[0].rows && token_of(k) < p.tokens; };
    float factor[SHARE / 2], gate[SHARE / 2], up[SHARE / 2];
#pragma unroll
    for (int k = 0; k < SHARE; k += 2) {  // all loads first, so that they overlap
        factor[k / 2] = valid(k) && p.factor ? p.factor[token_of(k)] : 1.f;
        gate[k / 2] = valid(k) && biases[0] ? biases[0][row_of(k)] : 0.f;
        up[k / 2] = valid(k) && biases[1] ? biases[1][row_of(k)] : 0.f;
    }
#pragma unroll
    for (int k = 0; k < SHARE; k += 2) {
        const float a = __fmaf_rn(y[k], factor[k / 2], gate[k / 2]), b = __fmaf_rn(y[k + 1], factor[k / 2], up[k / 2]);
        use(row_of(k), token_of(k), valid(k) ? gated<GATED == kGelu>(a, b, p.gate) : 0.f);
    }
}

template <int ROWS, int GATED, class Finished, int SHARE>
__device__ __forceinline__ void write_gated(const MmaParams& p, int tile, int first_row, int first_token,
                                            const Finished& sums, const float (&y)[SHARE]) {
    const int rows = p.matrices[0].rows;
    each_gated<ROWS, GATED>(p, tile, first_row, first_token, sums, y, [&](int row, int t, float h) {
        if (row < rows && t < p.tokens) p.matrices[0].out[(size_t)t * rows + row] = h;
    });
}
