// Prompt tokens of one sequence: attention over its cache, on tensor cores, without ever storing the scores.
//
//   y_h[t] = Σ_p softmax_p(q_h[t] · k_p / √D) v_p   over positions max(0, t-window+1) … t; a sink joins the denominator.
// FlashAttention-2 (Dao 2023, arXiv:2307.08691): a warp owns 16 queries of one head, keys and values pass in tiles of
// KEYS positions that start at absolute multiples of KEYS, double-buffered by cp.async. What a query computes follows
// from its position alone: a tile that it does not see multiplies its sums by one and adds zeros. So chunks, cached
// prefixes and neighbours never move its bits.
//
// q [T, H·D] f16, already turned (rope_kv.cu); caches as in kv_cache.cuh, written up to position start + T - 1; table i32
// of this sequence; place: {start, T} on the device, of which the grid covers at least T; sinks [H] f32 or null;
// y [T, padded H·D] f16 in the order of fragments.cuh: a mean of values of an f16 cache needs no scale. D is 64, 96 or 128;
// every row is 16-byte aligned.
// Grid (⌈T/64⌉, H), 128 threads; static shared memory of 4·KEYS·(D+8)·2 bytes. Flops: 4·D per head and seen pair.
// Bytes: q and y once, 2 an element; keys and values of all seen tiles once per 64 queries and head, mostly from L2.
// Twin: `attend` in worker/cpu/attention.py with an f16 cache.
#include "fragments.cuh"
#include "half.cuh"
#include "kv_cache.cuh"
#include "mma.cuh"
#include "warp.cuh"

constexpr int kQueries = 64, kThreads = 128, kPad = 8;  // an odd number of 16-byte pieces a row: no bank conflicts
constexpr float kLog2e = 1.4426950408889634f;

__host__ __device__ constexpr int keys_per_tile(int head_dim) { return head_dim == 64 ? 64 : 32; }

// Rows of a cache at positions [tile, tile + KEYS) into shared memory; zeros from `valid` on, where slots are unwritten.
template <int D>
__device__ __forceinline__ void fetch_tile(unsigned short (*rows)[D + kPad], const unsigned short* cache,
                                           const int* table, int n_kv_heads, int kv_head, int tile, int valid) {
    constexpr int kPieces = D / 8;
    for (int at = threadIdx.x; at < keys_per_tile(D) * kPieces; at += kThreads) {
        const int row = at / kPieces, piece = at % kPieces, position = tile + row;
        const bool there = position < valid;
        const int block = there ? table[position / kKvBlock] : 0;
        const size_t from = there ? kv_offset<D>(block, n_kv_heads, kv_head, position) : 0;
        copy_16_async(&rows[row][8 * piece], cache + from + 8 * piece, there);
    }
}

// scores [16, KEYS] = q · kᵀ: the keys' rows are the columns of B.
template <int D>
__device__ __forceinline__ void score(float (&scores)[keys_per_tile(D) / 8][4], const unsigned int (&q)[D / 16][4],
                                      const unsigned short (*keys)[D + kPad]) {
    const int lane = threadIdx.x % 32, row = lane % 8 + lane / 16 * 8, column = lane / 8 % 2 * 8;
#pragma unroll
    for (int n = 0; n < keys_per_tile(D) / 16; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[2 * n][i] = scores[2 * n + 1][i] = 0.f;
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            unsigned int b[4];
            load_matrices(b, &keys[16 * n + row][16 * k + column]);
            mma_16x8x16(scores[2 * n], q[k], b[0], b[1]);
            mma_16x8x16(scores[2 * n + 1], q[k], b[2], b[3]);
        }
    }
}

// sums [16, D] += weights · v: an accumulator's lanes already hold what A wants, 16 keys at a time.
template <int D>
__device__ __forceinline__ void add_values(float (&sums)[D / 8][4], const float (&weights)[keys_per_tile(D) / 8][4],
                                           const unsigned short (*values)[D + kPad]) {
    const int lane = threadIdx.x % 32, row = lane % 16, column = lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < keys_per_tile(D) / 16; ++k) {
        const unsigned int a[4] = {floats_to_half2(weights[2 * k][0], weights[2 * k][1]),
                                   floats_to_half2(weights[2 * k][2], weights[2 * k][3]),
                                   floats_to_half2(weights[2 * k + 1][0], weights[2 * k + 1][1]),
                                   floats_to_half2(weights[2 * k + 1][2], weights[2 * k + 1][3])};
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            unsigned int b[4];
            load_matrices_transposed(b, &values[16 * k + row][16 * n + column]);
            mma_16x8x16(sums[2 * n], a, b[0], b[1]);
            mma_16x8x16(sums[2 * n + 1], a, b[2], b[3]);
        }
    }
}

// One tile's step of the online softmax in base 2: scores become weights, sums and totals are brought to the new peak.
// A lane's two rows (half 0: lane/4, half 1: 8 below) are shared by the four lanes of its quad.
template <int D>
__device__ __forceinline__ void soften(float (&scores)[keys_per_tile(D) / 8][4], float (&sums)[D / 8][4],
                                       float (&peak)[2], float (&total)[2], const int (&position)[2], int tile,
                                       int window, float scale) {
    constexpr int kColumns = keys_per_tile(D) / 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float highest = peak[half];
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; ++i) {
                const int key = tile + 8 * n + threadIdx.x % 4 * 2 + i % 2;
                const bool seen = key <= position[half] && (!window || key > position[half] - window);
                scores[n][i] = seen ? scores[n][i] * scale : -kInfinity;
                highest = fmaxf(highest, scores[n][i]);
            }
        }
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
        const float base = highest == -kInfinity ? 0.f : highest;  // nothing seen yet: weights and factor are zero
        const float factor = exp2f(peak[half] - base);
        peak[half] = highest;
        total[half] *= factor;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; ++i) {
                scores[n][i] = exp2f(scores[n][i] - base);
                total[half] += scores[n][i];
            }
        }
#pragma unroll
        for (int n = 0; n < D / 8; ++n) sums[n][2 * half] *= factor, sums[n][2 * half + 1] *= factor;
    }
}

template <int D>
__global__ void __launch_bounds__(kThreads)
    attention_prefill(unsigned int* y, const unsigned short* q, const unsigned short* k_cache, const unsigned short* v_cache,
                      const int* table, const float* sinks, const int* place, int n_heads, int n_kv_heads,
                      int window) {
    constexpr int kKeys = keys_per_tile(D);
    __shared__ __align__(16) unsigned short keys[2][kKeys][D + kPad], values[2][kKeys][D + kPad];
    const int start = place[0], n_tokens = place[1];
    const int head = blockIdx.y, kv_head = head / (n_heads / n_kv_heads);
    const int first_row = (gridDim.x - 1 - blockIdx.x) * kQueries;  // the longest rows first: they end last
    if (first_row >= n_tokens) return;
    const int lane = threadIdx.x % 32, row = first_row + threadIdx.x / 32 * 16 + lane / 4;
    const int position[2] = {start + row, start + row + 8};
    const int valid = start + n_tokens, newest = min(start + first_row + kQueries, valid) - 1;
    const int oldest = window && start + first_row >= window ? start + first_row - window + 1 : 0;

    unsigned int queries[D / 16][4];
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // A: {row, row + 8} × {columns 0–7, columns 8–15}
            const int t = row + i % 2 * 8, column = 16 * k + i / 2 * 8 + lane % 4 * 2;
            const size_t at = ((size_t)t * n_heads + head) * D + column;
            queries[k][i] = t < n_tokens ? *reinterpret_cast<const unsigned int*>(q + at) : 0;
        }
    }
    float sums[D / 8][4] = {}, peak[2] = {-kInfinity, -kInfinity}, total[2] = {0.f, 0.f};
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
        float scores[kKeys / 8][4];
        score<D>(scores, queries, keys[stage]);
        soften<D>(scores, sums, peak, total, position, tile * kKeys, window, scale);
        add_values<D>(sums, scores, values[stage]);
        __syncthreads();
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        total[half] += __shfl_xor_sync(0xffffffffu, total[half], 1);
        total[half] += __shfl_xor_sync(0xffffffffu, total[half], 2);
        const int t = row + 8 * half;
        if (t >= n_tokens) continue;
        const float sink = sinks ? sinks[head] * kLog2e : -kInfinity, top = fmaxf(peak[half], sink);
        const float factor = exp2f(peak[half] - top);
        const float inverse = factor / (total[half] * factor + exp2f(sink - top));
        unsigned int* out = y + (size_t)t * (padded(n_heads * D) / 2);
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
            out[place_of(head * D + 8 * n + lane % 4 * 2) / 2] =
                floats_to_half2(sums[n][2 * half] * inverse, sums[n][2 * half + 1] * inverse);
        const int end = padded(n_heads * D);
        for (int at = n_heads * D + lane % 4 * 2; head == n_heads - 1 && at < end; at += 8) out[place_of(at) / 2] = 0;
    }
}
