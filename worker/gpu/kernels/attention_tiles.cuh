// Tiles of keys and values in shared memory, and a warp's tensor-core products over one tile.
//
// A strip is 16 queries of one head. A warp computes STRIPS strips, which share each key or value
// fragment; the bits of a query do not depend on STRIPS. keys_per_tile(D) positions a tile, D
// elements a head. QUERY_TILE, ROW_PAD, TILE_KEYS_* are defined by worker/gpu/prefill_attention.py.
// Users: attention_prefill.cu, attention_wgmma.cu, running_softmax.cuh.
#pragma once
#include "half.cuh"
#include "kv_cache.cuh"
#include "mma.cuh"
#include "warp.cuh"

static_assert(ROW_PAD % 16 == 8, "an odd number of 16-byte units a row avoids bank conflicts");

__host__ __device__ constexpr int keys_per_tile(int head_dim) {
    return head_dim == 64 ? TILE_KEYS_64 : head_dim == 96 ? TILE_KEYS_96 : head_dim == 128 ? TILE_KEYS_128 : TILE_KEYS_256;
}
__host__ __device__ constexpr int threads(int strips) { return 32 * QUERY_TILE / (16 * strips); }

template <int D>
using Tile = unsigned short[keys_per_tile(D)][D + ROW_PAD];
template <int D, int STRIPS>
using Queries = unsigned int[STRIPS][D / 16][4];

// Copy the rows of a cache at positions [tile, tile + keys_per_tile(D)) to shared memory; rows from
// `valid` on, whose slots are unwritten, become zeros. Each thread copies the same 16 bytes of
// every KV block. `blocks` of lane i is the KV block of positions 16·i … 16·i + 15 after a multiple
// of 16·LANES.
template <int D, int STRIPS, int LANES>
__device__ __forceinline__ void fetch_tile(Tile<D>& rows, const unsigned short* cache, int blocks, int n_kv_heads,
                                           int kv_head, int tile, int valid) {
    constexpr int kUnits = D / 8, kEach = kKvBlock * kUnits;  // 16 bytes each: of a row, of a block
#pragma unroll
    for (int b = 0; b < keys_per_tile(D) / kKvBlock; ++b) {
        const int first = tile + b * kKvBlock;
        const int block = __shfl_sync(0xffffffffu, blocks, first / kKvBlock % LANES);
        const unsigned short* from = cache + F16Kv::row<D>(block, n_kv_heads, kv_head, 0);
#pragma unroll
        for (int i = 0; i < (kEach + threads(STRIPS) - 1) / threads(STRIPS); ++i) {
            const int at = threadIdx.x + i * threads(STRIPS), row = at / kUnits;
            if (kEach % threads(STRIPS) && at >= kEach) continue;
            copy_16_async(&rows[b * kKvBlock + row][at % kUnits * 8], from + 8 * at, first + row < valid);
        }
    }
}

// The tiles of keys and values in shared memory: copied to stage 0 or 1, each by `fetch`, and read
// there after a barrier that follows `arrive`.
template <int D, int STRIPS, class Kv>
struct TileStages {
    static_assert(!Kv::kQuantized);
    Tile<D> stages[2][2];  // keys, values

    template <int LANES>
    __device__ __forceinline__ void fetch(int stage, int of, const unsigned short* cache, int blocks, int n_kv_heads,
                                          int kv_head, int tile, int valid) {
        fetch_tile<D, STRIPS, LANES>(stages[of][stage], cache, blocks, n_kv_heads, kv_head, tile, valid);
    }
    __device__ __forceinline__ void arrive(int, int, int) {}
    __device__ __forceinline__ const Tile<D>& keys(int stage) const { return stages[0][stage]; }
    __device__ __forceinline__ const Tile<D>& values(int stage) const { return stages[1][stage]; }
};

// With codes: head blocks are copied as they are, and elements are decoded, rounded to f16, before
// a tile is read.
template <int D, int STRIPS>
struct TileStages<D, STRIPS, Q8Kv> {
    static constexpr int kKeys = keys_per_tile(D), kBlocks = kKeys / kKvBlock;
    Tile<D> decoded[2];  // keys, values
    __align__(16) unsigned char copied[2][2][kBlocks][Q8Kv::kHeadBlock<D>];

    template <int LANES>
    __device__ __forceinline__ void fetch(int stage, int of, const unsigned char* cache, int blocks, int n_kv_heads,
                                          int kv_head, int tile, int valid) {
        constexpr int kUnits = Q8Kv::kHeadBlock<D> / 16, kThreads = threads(STRIPS);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
            const int first = tile + b * kKvBlock;
            const int block = __shfl_sync(0xffffffffu, blocks, first / kKvBlock % LANES);
            const unsigned char* from = cache + Q8Kv::row<D>(block, n_kv_heads, kv_head, 0);
#pragma unroll
            for (int i = 0; i < (kUnits + kThreads - 1) / kThreads; ++i) {
                const int at = threadIdx.x + i * kThreads;
                if (at < kUnits) copy_16_async(copied[of][stage][b] + 16 * at, from + 16 * at, first < valid);
            }
        }
    }
    // Called after the wait for the stage's copies, and by all threads. Rows from `valid` on become
    // zeros.
    __device__ __forceinline__ void arrive(int stage, int tile, int valid) {
        constexpr int kUnits = D / 16;  // 16 codes each
        __syncthreads();
#pragma unroll 1
        for (int at = threadIdx.x; at < 2 * kKeys * kUnits; at += threads(STRIPS)) {
            const int of = at / (kKeys * kUnits), row = at / kUnits % kKeys, unit = at % kUnits * 16;
            const unsigned char* block = copied[of][stage][row / kKvBlock];
            const unsigned int scale = tile + row < valid ? __byte_perm(Q8Kv::scale_bits<D>(block, row), 0, 0x1010) : 0;
            const uint4 codes = *reinterpret_cast<const uint4*>(block + row % kKvBlock * D + unit);
            uint4* const to = reinterpret_cast<uint4*>(&decoded[of][row][unit]);
            to[0] = eight(codes.x, codes.y, scale), to[1] = eight(codes.z, codes.w, scale);
        }
    }
    __device__ __forceinline__ const Tile<D>& keys(int) const { return decoded[0]; }
    __device__ __forceinline__ const Tile<D>& values(int) const { return decoded[1]; }

private:
    __device__ __forceinline__ static uint4 eight(unsigned int first, unsigned int last, unsigned int scale) {
        const uint2 a = Q8Kv::halves(first), b = Q8Kv::halves(last);
        return make_uint4(half2_mul(a.x, scale), half2_mul(a.y, scale), half2_mul(b.x, scale), half2_mul(b.y, scale));
    }
};

template <int D, int STRIPS>
using Scores = float[STRIPS][keys_per_tile(D) / 8][4];  // 16 queries × 8 keys: four values a lane
template <int D, int STRIPS>
using Sums = float[STRIPS][D / 8][4];

// scores [16·STRIPS, keys] = q · kᵀ: the rows of keys are the columns of B.
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

// sums [16·STRIPS, D] += weights · v: the score accumulators of 16 keys have the lane layout of A.
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

// Set the scores of keys that a query must not attend to (causal mask, window) to -∞. `first` is
// the position of the lane's first query; those beyond `newest`, without a token, attend like that
// one.
template <int D, int STRIPS>
__device__ __forceinline__ void apply_mask(Scores<D, STRIPS>& scores, int first, int tile, int window,
                                           int newest = 0x7fffffff) {
#pragma unroll
    for (int n = 0; n < keys_per_tile(D) / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4 * STRIPS; ++i) {
            const int key = tile + 8 * n + threadIdx.x % 4 * 2 + i % 2, position = min(first + i / 2 * 8, newest);
            const bool seen = key <= position && (!window || key > position - window);
            if (!seen) scores[i / 4][n][i % 4] = -kInfinity;
        }
    }
}
