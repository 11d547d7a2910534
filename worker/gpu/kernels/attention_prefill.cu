// Prompt tokens of one sequence: attention over its cache, on tensor cores, without ever storing the scores.
//
//   y_h[t] = Σ_p softmax_p(q_h[t] · k_p / √D) v_p   over positions max(0, t-window+1) … t; a sink joins the denominator.
// FlashAttention-2 (Dao 2023, arXiv:2307.08691): a warp owns 32 queries of one head (16 of D = 128), keys and values pass
// in tiles of KEYS positions that start at absolute multiples of KEYS, double-buffered by cp.async. What a query computes
// follows from its position alone: a tile that it does not see multiplies its sums by one and adds zeros. So chunks,
// cached prefixes and neighbours never move its bits.
//
// q [T, H·D] f16, already turned (rope_kv.cu); caches as in kv_cache.cuh, written up to position start + T - 1; table i32
// of this sequence; place: {start, T} on the device, of which the grid covers at least T; sinks [H] f32 or null;
// y [T, padded H·D] f16 in the order of fragments.cuh: a mean of values of an f16 cache needs no scale. D is 64, 96 or
// 128; every row is 16-byte aligned.
// Grid (⌈T/64⌉, H), 64 threads (128 of D = 128); static shared memory of 4·KEYS·(D+8)·2 bytes. Flops: 4·D per head and seen pair.
// Bytes: q and y once, 2 an element; keys and values of all seen tiles once per 64 queries and head, mostly from L2.
// Twin: `attend` in worker/cpu/attention.py with an f16 cache.
#include "fragments.cuh"
#include "half.cuh"
#include "kv_cache.cuh"
#include "mma.cuh"
#include "warp.cuh"

constexpr int kQueries = 64, kPad = 8;  // an odd number of 16-byte pieces a row: no bank conflicts
constexpr float kLog2e = 1.4426950408889634f;

__host__ __device__ constexpr int keys_per_tile(int head_dim) { return head_dim == 64 ? 64 : 32; }
__host__ __device__ constexpr int strips(int head_dim) { return head_dim == 128 ? 1 : 2; }  // a warp's 16 queries, times
__host__ __device__ constexpr int threads(int head_dim) { return 32 * kQueries / (16 * strips(head_dim)); }

// Rows of a cache at positions [tile, tile + KEYS) into shared memory; zeros from `valid` on, where slots are unwritten.
// One head's part of a KV block is one piece of memory; each thread takes the same 16 bytes of every block.
template <int D>
__device__ __forceinline__ void fetch_tile(unsigned short (*rows)[D + kPad], const unsigned short* cache,
                                           const int* table, int n_kv_heads, int kv_head, int tile, int valid) {
    constexpr int kPieces = D / 8;
#pragma unroll
    for (int b = 0; b < keys_per_tile(D) / kKvBlock; ++b) {
        const int first = tile + b * kKvBlock;
        const int block = first < valid ? table[first / kKvBlock] : 0;
        const unsigned short* from = cache + kv_offset<D>(block, n_kv_heads, kv_head, 0);
#pragma unroll
        for (int i = 0; i < kKvBlock * kPieces / threads(D); ++i) {
            const int at = threadIdx.x + i * threads(D), row = at / kPieces;
            copy_16_async(&rows[b * kKvBlock + row][at % kPieces * 8], from + 8 * at, first + row < valid);
        }
    }
}

template <int D>
using Scores = float[strips(D)][keys_per_tile(D) / 8][4];  // 16 queries, 8 keys, and a lane's four of these 128
template <int D>
using Sums = float[strips(D)][D / 8][4];
template <int D>
using Rows = float[2 * strips(D)];  // lane/4 and 8, 16, 24 after it; the four lanes of a quad share them

// scores [16·strips, KEYS] = q · kᵀ: the keys' rows are the columns of B.
template <int D>
__device__ __forceinline__ void score(Scores<D>& scores, const unsigned int (&q)[strips(D)][D / 16][4],
                                      const unsigned short (*keys)[D + kPad]) {
    const int lane = threadIdx.x % 32, row = lane % 8 + lane / 16 * 8, column = lane / 8 % 2 * 8;
#pragma unroll
    for (int n = 0; n < keys_per_tile(D) / 16; ++n) {
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            unsigned int b[4];
            load_matrices(b, &keys[16 * n + row][16 * k + column]);
#pragma unroll
            for (int m = 0; m < strips(D); ++m) {
                mma_16x8x16(scores[m][2 * n], q[m][k], b[0], b[1]);
                mma_16x8x16(scores[m][2 * n + 1], q[m][k], b[2], b[3]);
            }
        }
    }
}

// sums [16·strips, D] += weights · v: an accumulator's lanes already hold what A wants, 16 keys at a time.
template <int D>
__device__ __forceinline__ void add_values(Sums<D>& sums, const Scores<D>& weights,
                                           const unsigned short (*values)[D + kPad]) {
    const int lane = threadIdx.x % 32, row = lane % 16, column = lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < keys_per_tile(D) / 16; ++k) {
        unsigned int a[strips(D)][4];
#pragma unroll
        for (int i = 0; i < 4 * strips(D); ++i) {
            const float* pair = &weights[i / 4][2 * k + i / 2 % 2][i % 2 * 2];
            a[i / 4][i % 4] = floats_to_half2(pair[0], pair[1]);
        }
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            unsigned int b[4];
            load_matrices_transposed(b, &values[16 * k + row][16 * n + column]);
#pragma unroll
            for (int m = 0; m < strips(D); ++m) {
                mma_16x8x16(sums[m][2 * n], a[m], b[0], b[1]);
                mma_16x8x16(sums[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// Scores of keys that a query does not see become -∞. A lane's first query is at `first`.
template <int D>
__device__ __forceinline__ void hide(Scores<D>& scores, int first, int tile, int window) {
#pragma unroll
    for (int n = 0; n < keys_per_tile(D) / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4 * strips(D); ++i) {
            const int key = tile + 8 * n + threadIdx.x % 4 * 2 + i % 2, position = first + i / 2 * 8;
            const bool seen = key <= position && (!window || key > position - window);
            if (!seen) scores[i / 4][n][i % 4] = -kInfinity;
        }
    }
}

// One tile's step of the online softmax in base 2: scores become weights, sums and totals are brought to the new peak.
// Peaks are unscaled; they are scaled with a rounding of its own, so that an old peak's distance from itself is zero.
template <int D>
__device__ __forceinline__ void soften(Scores<D>& scores, Sums<D>& sums, Rows<D>& peak, Rows<D>& total, float scale) {
    constexpr int kColumns = keys_per_tile(D) / 8;
#pragma unroll
    for (int r = 0; r < 2 * strips(D); ++r) {
        float highest = peak[r];
#pragma unroll
        for (int i = 0; i < 2 * kColumns; ++i) highest = fmaxf(highest, scores[r / 2][i / 2][r % 2 * 2 + i % 2]);
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
        const float base = highest == -kInfinity ? 0.f : __fmul_rn(highest, scale);  // none seen yet: weights are zero
        const float factor = exp2f(__fmul_rn(peak[r], scale) - base);
        peak[r] = highest;
        total[r] *= factor;
#pragma unroll
        for (int i = 0; i < 2 * kColumns; ++i) {
            float& weight = scores[r / 2][i / 2][r % 2 * 2 + i % 2];
            weight = exp2f(weight * scale - base);
            total[r] += weight;
        }
#pragma unroll
        for (int i = 0; i < D / 4; ++i) sums[r / 2][i / 2][r % 2 * 2 + i % 2] *= factor;
    }
}

template <int D>
__global__ void __launch_bounds__(threads(D))
    attention_prefill(unsigned int* y, const unsigned short* q, const unsigned short* k_cache,
                      const unsigned short* v_cache, const int* table, const float* sinks, const int* place, int n_heads,
                      int n_kv_heads, int window) {
    constexpr int kKeys = keys_per_tile(D);
    __shared__ __align__(16) unsigned short keys[2][kKeys][D + kPad], values[2][kKeys][D + kPad];
    const int start = place[0], n_tokens = place[1];
    const int head = blockIdx.y, kv_head = head / (n_heads / n_kv_heads);
    const int first_row = (gridDim.x - 1 - blockIdx.x) * kQueries;  // the longest rows first: they end last
    if (first_row >= n_tokens) return;
    const int lane = threadIdx.x % 32, warp_row = first_row + threadIdx.x / 32 * 16 * strips(D);
    const int row = warp_row + lane / 4, seen_by_all = start + warp_row;
    const int valid = start + n_tokens, newest = min(start + first_row + kQueries, valid) - 1;
    const int oldest = window && start + first_row >= window ? start + first_row - window + 1 : 0;

    unsigned int queries[strips(D)][D / 16][4];
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
#pragma unroll
        for (int i = 0; i < 4 * strips(D); ++i) {  // A: {row, row + 8} × {columns 0–7, columns 8–15}
            const int t = row + i / 4 * 16 + i % 2 * 8, column = 16 * k + i / 2 % 2 * 8 + lane % 4 * 2;
            const size_t at = ((size_t)t * n_heads + head) * D + column;
            queries[i / 4][k][i % 4] = t < n_tokens ? *reinterpret_cast<const unsigned int*>(q + at) : 0;
        }
    }
    Sums<D> sums = {};
    Rows<D> peak, total = {};
    for (float& p : peak) p = -kInfinity;
    const float scale = rsqrtf((float)D) * kLog2e;

    const int first_tile = oldest / kKeys, last_tile = newest / kKeys;
    fetch_tile<D>(keys[0], k_cache, table, n_kv_heads, kv_head, first_tile * kKeys, valid);
    fetch_tile<D>(values[0], v_cache, table, n_kv_heads, kv_head, first_tile * kKeys, valid);
    commit_copies();
    for (int tile = first_tile; tile <= last_tile; ++tile) {
        const int stage = (tile - first_tile) % 2, next = (tile + 1) * kKeys;
        if (tile < last_tile) {
            fetch_tile<D>(keys[stage ^ 1], k_cache, table, n_kv_heads, kv_head, next, valid);
            fetch_tile<D>(values[stage ^ 1], v_cache, table, n_kv_heads, kv_head, next, valid);
        }
        commit_copies();
        wait_for_copies<1>();
        __syncthreads();
        Scores<D> scores = {};
        score<D>(scores, queries, keys[stage]);
        if (next > seen_by_all + 1 || (window && tile * kKeys < seen_by_all + 16 * strips(D) - window))
            hide<D>(scores, start + row, tile * kKeys, window);
        soften<D>(scores, sums, peak, total, scale);
        add_values<D>(sums, scores, values[stage]);
        __syncthreads();
    }

#pragma unroll
    for (int r = 0; r < 2 * strips(D); ++r) {
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
        const int t = row + 8 * r;
        if (t >= n_tokens) continue;
        const float sink = sinks ? sinks[head] * kLog2e : -kInfinity, high = __fmul_rn(peak[r], scale);
        const float top = fmaxf(high, sink), factor = exp2f(high - top);
        const float inverse = factor / (total[r] * factor + exp2f(sink - top));
        unsigned int* out = y + (size_t)t * (padded(n_heads * D) / 2);
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            const float* pair = &sums[r / 2][n][r % 2 * 2];
            out[place_of(head * D + 8 * n + lane % 4 * 2) / 2] = floats_to_half2(pair[0] * inverse, pair[1] * inverse);
        }
        const int end = padded(n_heads * D);
        for (int at = n_heads * D + lane % 4 * 2; head == n_heads - 1 && at < end; at += 8) out[place_of(at) / 2] = 0;
    }
}
