// One tile of keys and values, and what a warp's queries make of it on tensor cores: scores and weighted sums.
//
// A warp owns 16 queries of one head a strip; strips share each fragment that is read, and no query's bits depend on how
// many there are. KEYS positions a tile, D elements a head. Users: attention_prefill.cu; softmax: running_softmax.cuh.
#pragma once
#include "half.cuh"
#include "kv_cache.cuh"
#include "mma.cuh"
#include "warp.cuh"

constexpr int kQueries = 64, kPad = 8;  // an odd number of 16-byte pieces a row: no bank conflicts

__host__ __device__ constexpr int keys_per_tile(int head_dim) { return head_dim == 64 ? 64 : 32; }
__host__ __device__ constexpr int threads(int strips) { return 32 * kQueries / (16 * strips); }

template <int D>
using Tile = unsigned short[keys_per_tile(D)][D + kPad];
template <int D, int STRIPS>
using Queries = unsigned int[STRIPS][D / 16][4];

// Rows of a cache at positions [tile, tile + KEYS) into shared memory; zeros from `valid` on, where slots are unwritten.
// One head's part of a KV block is one piece of memory; each thread takes the same 16 bytes of every block. Lane i knows
// the block of each position that is 16·i to 16·i + 15 after a multiple of 16·LANES.
template <int D, int STRIPS, int LANES>
__device__ __forceinline__ void fetch_tile(Tile<D>& rows, const unsigned short* cache, int blocks, int n_kv_heads,
                                           int kv_head, int tile, int valid) {
    constexpr int kPieces = D / 8, kEach = kKvBlock * kPieces;
#pragma unroll
    for (int b = 0; b < keys_per_tile(D) / kKvBlock; ++b) {
        const int first = tile + b * kKvBlock;
        const int block = __shfl_sync(0xffffffffu, blocks, first / kKvBlock % LANES);
        const unsigned short* from = cache + kv_offset<D>(block, n_kv_heads, kv_head, 0);
#pragma unroll
        for (int i = 0; i < (kEach + threads(STRIPS) - 1) / threads(STRIPS); ++i) {
            const int at = threadIdx.x + i * threads(STRIPS), row = at / kPieces;
            if (kEach % threads(STRIPS) && at >= kEach) continue;
            copy_16_async(&rows[b * kKvBlock + row][at % kPieces * 8], from + 8 * at, first + row < valid);
        }
    }
}

template <int D, int STRIPS>
using Scores = float[STRIPS][keys_per_tile(D) / 8][4];  // 16 queries, 8 keys, and a lane's four of these 128
template <int D, int STRIPS>
using Sums = float[STRIPS][D / 8][4];

// scores [16·strips, KEYS] = q · kᵀ: the keys' rows are the columns of B.
template <int D, int STRIPS>
__device__ __forceinline__ void score(Scores<D, STRIPS>& scores, const Queries<D, STRIPS>& q, const Tile<D>& keys) {
    const int lane = threadIdx.x % 32, row = lane % 8 + lane / 16 * 8, column = lane / 8 % 2 * 8;
#pragma unroll
    for (int n = 0; n < keys_per_tile(D) / 16; ++n) {
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            unsigned int b[4];
            load_matrices(b, &keys[16 * n + row][16 * k + column]);
#pragma unroll
            for (int m = 0; m < STRIPS; ++m) {
                mma_16x8x16(scores[m][2 * n], q[m][k], b[0], b[1]);
                mma_16x8x16(scores[m][2 * n + 1], q[m][k], b[2], b[3]);
            }
        }
    }
}

// sums [16·strips, D] += weights · v: an accumulator's lanes already hold what A wants, 16 keys at a time.
template <int D, int STRIPS>
__device__ __forceinline__ void add_values(Sums<D, STRIPS>& sums, const Scores<D, STRIPS>& weights,
                                           const Tile<D>& values) {
    const int lane = threadIdx.x % 32, row = lane % 16, column = lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < keys_per_tile(D) / 16; ++k) {
        unsigned int a[STRIPS][4];
#pragma unroll
        for (int i = 0; i < 4 * STRIPS; ++i) {
            const float* pair = &weights[i / 4][2 * k + i / 2 % 2][i % 2 * 2];
            a[i / 4][i % 4] = floats_to_half2(pair[0], pair[1]);
        }
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            unsigned int b[4];
            load_matrices_transposed(b, &values[16 * k + row][16 * n + column]);
#pragma unroll
            for (int m = 0; m < STRIPS; ++m) {
                mma_16x8x16(sums[m][2 * n], a[m], b[0], b[1]);
                mma_16x8x16(sums[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// Scores of keys that a query does not see become -∞. A lane's first query is at `first`.
template <int D, int STRIPS>
__device__ __forceinline__ void hide(Scores<D, STRIPS>& scores, int first, int tile, int window) {
#pragma unroll
    for (int n = 0; n < keys_per_tile(D) / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4 * STRIPS; ++i) {
            const int key = tile + 8 * n + threadIdx.x % 4 * 2 + i % 2, position = first + i / 2 * 8;
            const bool seen = key <= position && (!window || key > position - window);
            if (!seen) scores[i / 4][n][i % 4] = -kInfinity;
        }
    }
}
