// Prefill attention of a batch of chunks, each over the KV cache of its sequence (FlashAttention-2,
// tensor cores).
//
//   y_h[t] = Σ_p softmax_p(q_h[t] · k_p / √D) v_p   over positions max(0, t-window+1) … t
// A sink logit, if any, joins the denominator.
// FlashAttention-2 (Dao 2023, arXiv:2307.08691): a warp computes strips of 16 queries of one head;
// keys and values pass in tiles that start at absolute multiples of the tile, double-buffered by
// cp.async. At each absolute multiple of SEGMENT positions the softmax starts anew; segments are
// merged oldest first (running_softmax.cuh). The arithmetic of a query thus follows from its
// position alone: a tile or segment without visible keys multiplies its sums by one and adds zeros,
// and the bits do not depend on which block computes a segment. Chunking, cached prefixes, other
// queries and other chunks never change the bits of a query.
//
// A block computes a tile of at most 64 queries of one chunk (prefill_batch.cuh). Without SPLIT it
// computes all their segments. A short chunk after a long prefix has too few such blocks. With
// SPLIT the X blocks of a head are Z = X / tiles for each tile: block z computes segments z, z + Z,
// … and stores a partial result of each; the block that arrives last merges them. If the partial
// results exceed `capacity`, block 0 computes all segments. The KV blocks of a segment are looked
// up once.
//
// Inputs: q [T, H·D] f16, already rotated (rope_kv.cu or matmul_wgmma_rope.cu); caches as in
// kv_cache.cuh, written up to the end of each chunk; batch; sinks [H] f32 or null. Output: y [T,
// padded(H·D)] f16 in the order of fragments.cuh (a mean of f16 values needs no scale). Rows
// between two chunks get the results of zero queries, which are finite.
// Scratch: partials, `capacity` times partial_quads(D, 1) float4; arrivals, tiles·H u32, zero
// before and after each launch; both null if no context has several segments. D is 64, 96, 128 or
// 256.
// Grid (X ≥ tiles, H), block threads(strips(D, SPLIT)); other blocks exit. Dynamic
// shared memory: TileStages (attention_tiles.cuh), and 256·(D+8) bytes of partial results.
// Alignment: every row 16 bytes. Flops: 4·D per head and visible pair. Bytes: q and y once, 2 an
// element; keys and values of all visible tiles once per 64 queries and head, mostly from L2; with
// SPLIT also 4·(D+8) per query, head and segment, written and read.
// Twin: `attend` in worker/cpu/attention.py with a cache of the same type; codes are decoded to
// f16.
#include "arrival.cuh"
#include "pdl.cuh"
#include "prefill_batch.cuh"
#include "query_rows.cuh"

__host__ __device__ constexpr int strips(int head_dim, bool split) {
    return split ? 1 : head_dim == 64 ? STRIPS_64 : head_dim == 96 ? STRIPS_96 : head_dim == 128 ? STRIPS_128 : STRIPS_256;
}
static_assert(16 * partial_quads(64, 1) == PARTIAL_BYTES_64 && 16 * partial_quads(96, 1) == PARTIAL_BYTES_96 &&
                  16 * partial_quads(128, 1) == PARTIAL_BYTES_128 && 16 * partial_quads(256, 1) == PARTIAL_BYTES_256,
              "as reserved by worker/gpu/prefill_attention.py");

// Blocks of a multiprocessor: the most that registers (without spills, but for heads of 256) and
// shared memory allow on sm_90.
__host__ __device__ constexpr int blocks_of(int head_dim, bool split) {
    return head_dim == 256 ? 2 : (head_dim == 128 ? 3 : 4) - split;
}

template <int D, bool SPLIT, class Kv>
__global__ void __launch_bounds__(threads(strips(D, SPLIT)), blocks_of(D, SPLIT))
    attention_prefill(unsigned int* y, const unsigned short* q, const typename Kv::Element* k_cache,
                      const typename Kv::Element* v_cache, const PrefillBatch batch, const float* sinks,
                      float4* partials, unsigned int* arrivals, int capacity, int n_heads, int n_kv_heads, int window) {
    constexpr int STRIPS = strips(D, SPLIT), kRows = 16 * STRIPS, kPartial = partial_quads(D, STRIPS);
    constexpr int kKeys = keys_per_tile(D), kTiles = SEGMENT / kKeys;
    extern __shared__ __align__(16) unsigned short shared[];
    using Tiles = TileStages<D, STRIPS, Kv>;
    Tiles& tiles = *reinterpret_cast<Tiles*>(shared);
    float4* kept = reinterpret_cast<float4*>(&tiles + 1) + threadIdx.x / 32 * kPartial;
    const PrefillSize size = *batch.size;
    const int layer = blockIdx.x / size.tiles, layers = gridDim.x / size.tiles;
    if (layer >= (SPLIT ? layers : 1)) return;
    const PrefillTile queries_of = batch.tiles[blockIdx.x % size.tiles];
    const int* const table = batch.tables + queries_of.table;
    const int head = blockIdx.y, kv_head = head / (n_heads / n_kv_heads);
    const int first = queries_of.position, valid = queries_of.end, end_row = queries_of.row + valid - first;
    const int warp_row = queries_of.row + threadIdx.x / 32 * kRows, row = warp_row + threadIdx.x % 32 / 4;
    const int seen_by_all = first + warp_row - queries_of.row, newest = min(first + QUERY_TILE, valid) - 1;
    const int oldest = window && first >= window ? first - window + 1 : 0, first_segment = oldest / SEGMENT;

    const int segments = newest / SEGMENT - first_segment + 1;
    int most_segments = (size.longest - 1) / SEGMENT + 1;  // of a tile of the batch
    if (window) most_segments = min(most_segments, (window + QUERY_TILE - 3) / SEGMENT + 2);
    const int strips_of_batch = (size.rows + kRows - 1) / kRows;
    const bool split = SPLIT && layers > 1 && segments > 1 && strips_of_batch * n_heads * most_segments <= capacity;
    const int stride = split ? layers : 1;
    if (layer >= (split ? segments : 1)) return;
    const auto partial_of = [=](int segment) {
        const int at = (warp_row / kRows * n_heads + head) * most_segments + segment - first_segment;
        return partials + (size_t)at * kPartial;
    };

    constexpr int kLanes = SEGMENT / kKvBlock;
    static_assert(kLanes <= 32, "each lane holds one KV block of a segment");
    const auto blocks_of_segment = [=](int segment) {  // one a lane
        const int at = segment * kLanes + threadIdx.x % 32 % kLanes;
        return at * kKvBlock < valid ? table[at] : 0;
    };
    const auto fetch = [&](int stage, int tile, int blocks) {
        tiles.template fetch<kLanes>(stage, 0, k_cache, blocks, n_kv_heads, kv_head, tile * kKeys, valid);
        tiles.template fetch<kLanes>(stage, 1, v_cache, blocks, n_kv_heads, kv_head, tile * kKeys, valid);
        commit_copies();
    };
    const int last_tile = newest / kKeys, last_segment = newest / SEGMENT;
    int segment = first_segment + layer, tile = max(oldest / kKeys, segment * kTiles), stage = 0;
    int blocks = blocks_of_segment(segment);
    // A tile before the chunk's start holds tokens of earlier batches only: fetch it before the
    // wait.
    if ((tile + 1) * kKeys > queries_of.start) grid_dependency_wait();
    fetch(0, tile, blocks);
    grid_dependency_wait();
    Queries<D, STRIPS> queries;
    load_queries<D, STRIPS>(queries, q, row, end_row, head, n_heads);
    Softmax<D, STRIPS> state;
    const float scale = __fmul_rn(rsqrtf((float)D), kLog2e);
    for (; segment <= last_segment; segment += stride) {
        state.reset();
        const int next_blocks = blocks_of_segment(segment + stride);
        for (const int end = min((segment + 1) * kTiles, last_tile + 1); tile < end; stage ^= 1) {
            const int next = tile + 1 < end ? tile + 1 : (segment + stride) * kTiles;
            if (next <= last_tile) {
                fetch(stage ^ 1, next, tile + 1 < end ? blocks : next_blocks);
                wait_for_copies<1>();
            } else {
                wait_for_copies<0>();
            }
            tiles.arrive(stage, tile * kKeys, valid);
            __syncthreads();
            Scores<D, STRIPS> scores = {};
            score<D, STRIPS>(scores, queries, tiles.keys(stage));
            if ((tile + 1) * kKeys > seen_by_all + 1 || (window && tile * kKeys < seen_by_all + kRows - window))
                apply_mask<D, STRIPS>(scores, first + row - queries_of.row, tile * kKeys, window);
            state.update(scores, scale);
            add_values<D, STRIPS>(state.sums, scores, tiles.values(stage));
            __syncthreads();
            tile = next;
        }
        blocks = next_blocks;
        if (!split && segment > first_segment) state.merge_older(kept, scale);
        if (split ? warp_row < end_row : segment < last_segment) state.store(split ? partial_of(segment) : kept);
    }

    if (split && !arrives_last(arrivals + blockIdx.x % size.tiles * n_heads + head, min(segments, stride))) return;
    if (warp_row >= end_row) return;
    if constexpr (D > 128) {  // registers hold one state
        for (int s = 0; split && s < segments; ++s) {
            state.load(partial_of(first_segment + s));
            if (s) state.merge_older(kept, scale);
            if (s < segments - 1) state.store(kept);
        }
    } else if (split) {
        Softmax<D, STRIPS> next;  // loaded while the preceding one is merged
        next.load(partial_of(first_segment));
        for (int s = 0; s < segments; ++s) {
            state = next;
            if (s < segments - 1) next.load(partial_of(first_segment + s + 1));
            if (s) state.merge_older(kept, scale);
            if (s < segments - 1) state.store(kept);
        }
    }
    const int end_strip = (end_row + 15) / 16 * 16;  // y of the rows after the chunk's tokens must be finite
    write_rows<D, STRIPS>(state, y, sinks, scale, row, min(end_strip, size.rows), head, n_heads);
}
