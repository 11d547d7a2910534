// Prompt tokens of one sequence: attention over its cache, on tensor cores, without ever storing the scores.
//
//   y_h[t] = Σ_p softmax_p(q_h[t] · k_p / √D) v_p   over positions max(0, t-window+1) … t; a sink joins the denominator.
// FlashAttention-2 (Dao 2023, arXiv:2307.08691): a warp owns strips of 16 queries of one head, keys and values pass in
// tiles of KEYS positions that start at absolute multiples of KEYS, double-buffered by cp.async. At each absolute multiple
// of kSegment positions the softmax starts afresh; segments are merged from the oldest on (running_softmax.cuh). So what a
// query computes follows from its position alone: a tile or segment that it does not see multiplies its sums by one and
// adds zeros, and who walks a segment does not matter. Chunks, cached prefixes and neighbours never move its bits.
//
// A block walks all segments of its queries. Of a short piece after a long prefix there are too few such blocks: where
// SPLIT, the grid has Z layers, block z takes segments z, z + Z, … and leaves a part of each, and the block that arrives
// last merges them. Should the parts need more than `room`, layer 0 walks all segments after all. Which KV blocks a segment
// lies in is looked up once, and a first tile of earlier pieces is on its way before q is there (pdl.cuh).
//
// q [T, H·D] f16, already turned (rope_kv.cu); caches as in kv_cache.cuh, written up to position start + T - 1; table i32
// of this sequence; place: {start, T} on the device, of which the grid covers at least T; sinks [H] f32 or null;
// y [T, padded H·D] f16 in the order of fragments.cuh: a mean of values of an f16 cache needs no scale. D is 64, 96 or
// 128; every row is 16-byte aligned. parts: `room` times part_quads float4; arrivals: ⌈T/64⌉·H u32, zeros before and
// after; both null where Z is 1.
// Grid (⌈T/64⌉, H, Z), threads(strips(D, SPLIT)) threads; dynamic shared memory: 4·KEYS·(D+8)·2 bytes of tiles, 256·(D+8)
// of parts. Flops: 4·D per head and seen pair. Bytes: q and y once, 2 an element; keys and values of all seen tiles once
// per 64 queries and head, mostly from L2; where split, 4·(D+8) a query, head and segment, there and back.
// Twin: `attend` in worker/cpu/attention.py with an f16 cache.
#include "arrival.cuh"
#include "pdl.cuh"
#include "fragments.cuh"
#include "running_softmax.cuh"

constexpr int kSegment = 256;

__host__ __device__ constexpr int strips(int head_dim, bool split) { return split || head_dim == 128 ? 1 : 2; }

// Blocks of a multiprocessor: as many as registers allow without spills; sm_90 has the shared memory for them.
__host__ __device__ constexpr int blocks_of(int head_dim, bool split) { return (head_dim == 128 ? 3 : 4) - split; }

template <int D, int STRIPS>
__device__ __forceinline__ void load_queries(Queries<D, STRIPS>& queries, const unsigned short* q, int row, int n_tokens,
                                             int head, int n_heads) {
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
#pragma unroll
        for (int i = 0; i < 4 * STRIPS; ++i) {  // A: {row, row + 8} × {columns 0–7, columns 8–15}
            const int t = row + i / 4 * 16 + i % 2 * 8, column = 16 * k + i / 2 % 2 * 8 + threadIdx.x % 4 * 2;
            const size_t at = ((size_t)t * n_heads + head) * D + column;
            queries[i / 4][k][i % 4] = t < n_tokens ? *reinterpret_cast<const unsigned int*>(q + at) : 0;
        }
    }
}

// Ends the softmax, sinks included, and writes y; a sum that underflowed below zero is zero like any other.
template <int D, int STRIPS>
__device__ __forceinline__ void write_rows(Softmax<D, STRIPS>& state, unsigned int* y, const float* sinks, float scale,
                                           int row, int n_tokens, int head, int n_heads) {
    const int lane = threadIdx.x % 32, end = padded(n_heads * D);
    const float sink = sinks ? __fmul_rn(sinks[head], kLog2e) : -kInfinity;
#pragma unroll
    for (int r = 0; r < 2 * STRIPS; ++r) {
        float total = state.total[r];
        total = __fadd_rn(total, __shfl_xor_sync(0xffffffffu, total, 1));
        total = __fadd_rn(total, __shfl_xor_sync(0xffffffffu, total, 2));
        const int t = row + 8 * r;
        if (t >= n_tokens) continue;
        const float high = __fmul_rn(state.peak[r], scale), top = fmaxf(high, sink), factor = exp2f(high - top);
        const float inverse = factor / fmaf(total, factor, exp2f(sink - top));
        unsigned int* out = y + (size_t)t * (end / 2);
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            const float* pair = &state.sums[r / 2][n][r % 2 * 2];
            const float lower = fmaf(pair[0], inverse, 0.f), upper = fmaf(pair[1], inverse, 0.f);
            out[place_of(head * D + 8 * n + lane % 4 * 2) / 2] = floats_to_half2(lower, upper);
        }
        for (int at = n_heads * D + lane % 4 * 2; head == n_heads - 1 && at < end; at += 8) out[place_of(at) / 2] = 0;
    }
}

template <int D, bool SPLIT>
__global__ void __launch_bounds__(threads(strips(D, SPLIT)), blocks_of(D, SPLIT))
    attention_prefill(unsigned int* y, const unsigned short* q, const unsigned short* k_cache,
                      const unsigned short* v_cache, const int* table, const float* sinks, const int* place,
                      float4* parts, unsigned int* arrivals, int room, int n_heads, int n_kv_heads, int window) {
    constexpr int STRIPS = strips(D, SPLIT), kRows = 16 * STRIPS, kPart = part_quads(D, STRIPS);
    constexpr int kKeys = keys_per_tile(D), kTiles = kSegment / kKeys;
    extern __shared__ __align__(16) unsigned short shared[];
    Tile<D>* keys = reinterpret_cast<Tile<D>*>(shared);
    Tile<D>* values = keys + 2;
    float4* kept = reinterpret_cast<float4*>(values + 2) + threadIdx.x / 32 * kPart;
    const int start = place[0], n_tokens = place[1];
    const int head = blockIdx.y, kv_head = head / (n_heads / n_kv_heads);
    const int first_row = (gridDim.x - 1 - blockIdx.x) * kQueries;  // the longest rows first: they end last
    if (first_row >= n_tokens) return;
    const int warp_row = first_row + threadIdx.x / 32 * kRows, row = warp_row + threadIdx.x % 32 / 4;
    const int seen_by_all = start + warp_row;
    const int valid = start + n_tokens, newest = min(start + first_row + kQueries, valid) - 1;
    const auto oldest_of = [=](int position) { return window && position >= window ? position - window + 1 : 0; };
    const int oldest = oldest_of(start + first_row), first_segment = oldest / kSegment;

    const int segments = newest / kSegment - first_segment + 1;
    const int pieces_first = oldest_of(start) / kSegment, pieces_segments = (valid - 1) / kSegment - pieces_first + 1;
    const int warps = (n_tokens + kRows - 1) / kRows;
    const bool split = SPLIT && gridDim.z > 1 && segments > 1 && warps * n_heads * pieces_segments <= room;
    const int stride = split ? gridDim.z : 1;
    if (blockIdx.z >= (split ? segments : 1)) return;
    const auto part = [=](int segment) {
        const int of = (warp_row / kRows * n_heads + head) * pieces_segments + segment - pieces_first;
        return parts + (size_t)of * kPart;
    };

    constexpr int kLanes = kSegment / kKvBlock;
    static_assert(kLanes <= 32, "a lane knows one of a segment's blocks");
    const auto blocks_of_segment = [=](int segment) {  // a lane each
        const int at = segment * kLanes + threadIdx.x % 32 % kLanes;
        return at * kKvBlock < valid ? table[at] : 0;
    };
    const auto fetch = [&](int stage, int tile, int blocks) {
        fetch_tile<D, STRIPS, kLanes>(keys[stage], k_cache, blocks, n_kv_heads, kv_head, tile * kKeys, valid);
        fetch_tile<D, STRIPS, kLanes>(values[stage], v_cache, blocks, n_kv_heads, kv_head, tile * kKeys, valid);
        commit_copies();
    };
    const int last_tile = newest / kKeys, last_segment = newest / kSegment;
    int segment = first_segment + blockIdx.z, tile = max(oldest / kKeys, segment * kTiles), stage = 0;
    int blocks = blocks_of_segment(segment);
    if ((tile + 1) * kKeys > start) grid_dependency_wait();  // else the first tile is of earlier pieces
    fetch(0, tile, blocks);
    grid_dependency_wait();
    Queries<D, STRIPS> queries;
    load_queries<D, STRIPS>(queries, q, row, n_tokens, head, n_heads);
    Softmax<D, STRIPS> state;
    const float scale = rsqrtf((float)D) * kLog2e;
    for (; segment <= last_segment; segment += stride) {
        state.begin();
        const int blocks_then = blocks_of_segment(segment + stride);
        for (const int end = min((segment + 1) * kTiles, last_tile + 1); tile < end; stage ^= 1) {
            const int next = tile + 1 < end ? tile + 1 : (segment + stride) * kTiles;
            if (next <= last_tile) {
                fetch(stage ^ 1, next, tile + 1 < end ? blocks : blocks_then);
                wait_for_copies<1>();
            } else {
                wait_for_copies<0>();
            }
            __syncthreads();
            Scores<D, STRIPS> scores = {};
            score<D, STRIPS>(scores, queries, keys[stage]);
            if ((tile + 1) * kKeys > seen_by_all + 1 || (window && tile * kKeys < seen_by_all + kRows - window))
                hide<D, STRIPS>(scores, start + row, tile * kKeys, window);
            state.soften(scores, scale);
            add_values<D, STRIPS>(state.sums, scores, values[stage]);
            __syncthreads();
            tile = next;
        }
        blocks = blocks_then;
        if (!split && segment > first_segment) state.follow(kept, scale);
        if (split ? warp_row < n_tokens : segment < last_segment) state.leave(split ? part(segment) : kept);
    }

    if (split && !arrives_last(arrivals + blockIdx.x * n_heads + head, min(segments, stride))) return;
    if (warp_row >= n_tokens) return;
    if (split) {
        Softmax<D, STRIPS> next;  // on its way while the one before it is merged
        next.take(part(first_segment));
        for (int s = 0; s < segments; ++s) {
            state = next;
            if (s < segments - 1) next.take(part(first_segment + s + 1));
            if (s) state.follow(kept, scale);
            if (s < segments - 1) state.leave(kept);
        }
    }
    write_rows<D, STRIPS>(state, y, sinks, scale, row, n_tokens, head, n_heads);
}
