// Exchange of a warp's sums through shared memory, so that epilogues write 8 or 16 bytes a lane.
// Users: matmul_wgmma.cu, matmul_wgmma_rope.cu.
#pragma once
#include "matmul_tile.cuh"

constexpr int kStagedTokens = 32;

// 16 rows of 32 tokens: four MMA fragments of a warp, each [8 tokens][4 quads of rows].
struct __align__(16) StagedRows {
    float sums[kStagedTokens * 16];

    // A quad of rows. Tokens of a fragment are in the order 0, 2, 4, 6, 1, 3, 5, 7, so that neither
    // the stores of fragments nor the loads of quads have bank conflicts.
    __device__ __forceinline__ float* quad(int fragment, int token, int quad) {
        const int place = token / 2 + token % 2 * 4;
        return sums + 128 * fragment + 16 * place + 4 * (quad ^ place / 2 % 2 * 2);
    }
};

__device__ __forceinline__ void load_quad(const float* from, float* to) {
    const float4 f = *reinterpret_cast<const float4*>(from);
    to[0] = f.x, to[1] = f.y, to[2] = f.z, to[3] = f.w;
}

// Four adjacent rows of y, of which `valid` exist; 16 bytes at once where rows of y are aligned.
struct RowQuad {
    int valid;
    bool aligned;
    __device__ __forceinline__ void load(const float* from, float* to) const {
        if (aligned) {
            if (valid > 0) load_quad(from, to);
        } else {
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (e < valid) to[e] = from[e];
        }
    }
    __device__ __forceinline__ void store(float* to, const float* from) const {
        if (aligned) {
            if (valid > 0) *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
        } else {
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (e < valid) to[e] = from[e];
        }
    }
};

// Store a warp's sums of kStagedTokens tokens from `first` on.
template <int WIDTH>
__device__ __forceinline__ void stage_sums(const Accumulator<1, WIDTH>& sums, int first, StagedRows& staged) {
    __syncwarp();  // the sums before have been read
#pragma unroll
    for (int n = 0; n < WIDTH / 8; ++n)
        if (8 * n / kStagedTokens * kStagedTokens == first) {
#pragma unroll
            for (int e = 0; e < 4; ++e)
                staged.quad(n % 4, threadIdx.x % 4 * 2 + e % 2, threadIdx.x % 32 / 16 + e / 2 * 2)[threadIdx.x % 32 / 4 % 4] =
                    sums[0][n][e];
        }
    __syncwarp();
}

// A lane's staged sums, with scale and bias: for each token that it takes, a quad of rows of each of
// MATRICES matrices, or of both elements of pairs.
template <int MATRICES>
struct LaneQuads {
    static constexpr int kMatrices = MATRICES, kQuads = 4 / MATRICES, kTokens = 32 / kQuads;  // of a warp at once
    static constexpr int kStores = kStagedTokens / kTokens;
    float y[MATRICES][4 * kStores];

    __device__ __forceinline__ static int quad() { return threadIdx.x % kQuads; }
    // The i-th token of the lane, of those that are staged.
    __device__ __forceinline__ static int token(int i) { return kTokens * i + threadIdx.x % 32 / kQuads; }

    template <int TILE_N>
    __device__ __forceinline__ void load(StagedRows& staged, const TokenTile<TILE_N>& tokens, int first,
                                         const float (&bias)[MATRICES][4]) {
#pragma unroll
        for (int i = 0; i < kStores; ++i) {
            const float scale = tokens.scales[first + token(i)];
#pragma unroll
            for (int j = 0; j < MATRICES; ++j) {
                float sum[4];
                load_quad(staged.quad(token(i) / 8, token(i) % 8, quad() + 2 * j), sum);
#pragma unroll
                for (int e = 0; e < 4; ++e) y[j][4 * i + e] = __fmaf_rn(sum[e], scale, bias[j][e]);
            }
        }
    }
};

// Write y as `write` does, bit for bit, with GLU or a residual. The loop is not unrolled: its code
// would exceed the instruction cache.
template <int TILE_N, int WIDTH, int GLU>
__device__ __forceinline__ void write_staged(const MatmulParams& p, const Projection* projections,
                                             const TokenTile<TILE_N>& tokens, int row0,
                                             const Accumulator<1, WIDTH>& sums, StagedRows& staged) {
    using Quads = LaneQuads<GLU ? 2 : 1>;
    constexpr int kMatrices = Quads::kMatrices, kStores = Quads::kStores;
    const int rows = projections->rows, r = row0 + 4 * Quads::quad();
    const RowQuad y_rows{rows - r, rows % 4 == 0};
    const auto offset = [&](int token) { return (size_t)tokens.slots[token] * (GLU ? padded(rows) : rows) + r; };
    const auto exists = [&](int e) { return row_at<GLU>(r + e) < rows; };
    float bias[kMatrices][4] = {}, residual[4 * kStores] = {};
#pragma unroll
    for (int j = 0; j < kMatrices; ++j) {
        if (!projections[j].bias) continue;
        const float* const from = projections[j].bias + (size_t)tokens.tile.expert * rows;
        if constexpr (GLU > 0) {
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (exists(e)) bias[j][e] = from[row_at<GLU>(r + e)];
        } else {
            y_rows.load(from + r, bias[j]);
        }
    }
    const auto load_residual = [&](int first) {
        if constexpr (!GLU) {
#pragma unroll
            for (int i = 0; i < kStores; ++i) y_rows.load(p.residual + offset(first + Quads::token(i)), residual + 4 * i);
        }
    };
    load_residual(0);
#pragma unroll 1
    for (int first = 0; first < WIDTH; first += kStagedTokens) {
        stage_sums<WIDTH>(sums, first, staged);
        Quads lane;
        lane.load(staged, tokens, first, bias);
        if constexpr (GLU > 0) gated<GLU == kGelu>(lane.y[0], lane.y[1], p.gate);
#pragma unroll
        for (int k = 0; k < 4 * kStores; ++k) lane.y[0][k] = __fadd_rn(lane.y[0][k], residual[k]);
        if (first + kStagedTokens < WIDTH) load_residual(first + kStagedTokens);
#pragma unroll
        for (int i = 0; i < kStores; ++i) {
            const int token = first + Quads::token(i);
            if (token >= tokens.tile.count) continue;
            if constexpr (GLU > 0) {
                const auto h = [&](int e) { return exists(e) ? lane.y[0][4 * i + e] * tokens.h_inverses[token] : 0.f; };
                *reinterpret_cast<uint2*>(reinterpret_cast<u16*>(projections->out) + offset(token)) =
                    make_uint2(floats_to_half2(h(0), h(1)), floats_to_half2(h(2), h(3)));
            } else {
                y_rows.store(projections->out + offset(token), lane.y[0] + 4 * i);
            }
        }
    }
}
