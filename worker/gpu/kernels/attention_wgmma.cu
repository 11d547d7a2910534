// Prefill attention on sm_90: attention_prefill.cu without SPLIT, bit for bit, by `wgmma`.
//
// A block computes a wide tile of queries of one head: three warpgroups 64 each, a warp 16, with
// queries, weights and sums in registers as in attention_prefill.cu. The warps of a fourth
// warpgroup copy tiles of keys and values by tensor maps into a ring of stages. The scores of a
// tile are multiplied together with the values of the tile before, and the softmax of those scores
// begins while the values are multiplied. Each element is the same chain of MMAs over the same
// tiles and segments as in attention_prefill.cu.
//
// Inputs, output, alignment: as in attention_prefill.cu with an f16 cache, whose keys and values
// are tensor maps of [blocks·Hk·16, D] in boxes of 16 rows × kColumns of KvTile. Rows of a tile
// from the end of the sequence on, whose slots are unwritten, become zeros: whole KV blocks as
// boxes beyond the map, the rest of a block by stores.
// Grid (H, ≥ wide tiles), 512 threads; other blocks exit. Dynamic shared memory: 1,024 bytes of
// alignment, 4·stages·keys·D of tiles, 768·(D+8) of older segments. D is 64, 96 or 128.
// Bytes: keys and values of all visible tiles once per 192 queries and head, mostly from L2.
// Twin: `attend` in worker/cpu/attention.py with an f16 cache.
#include "pdl.cuh"
#include "prefill_batch.cuh"
#include "query_rows.cuh"
#include "stages.cuh"
#include "wgmma.cuh"

constexpr int kGroups = 3, kGroupRows = WIDE_TILE / kGroups, kConsumers = 128 * kGroups;
static_assert(kGroupRows == 64, "rows of an MMA");

// A stage: keys, then values, each as panels [kKeys][kColumns].
template <int D>
struct KvTile {
    static constexpr int kStages = D == 64 ? WGMMA_STAGES_64 : D == 96 ? WGMMA_STAGES_96 : WGMMA_STAGES_128;
    static constexpr int kKeys = keys_per_tile(D), kColumns = D % 64 ? 32 : 64, kPanels = D / kColumns;
    static constexpr int kRowBytes = 2 * kColumns, kPanelBytes = kKeys * kRowBytes, kBytes = kPanels * kPanelBytes;
    static_assert(kStages * kKeys > WIDE_TILE - kGroupRows, "a warpgroup does not release its last tile");
};
template <int D>
using Ring = Stages<KvTile<D>::kStages>;

// The tiles of a block's keys and values: [begin, end).
template <int D>
struct Tiles {
    using Kv = KvTile<D>;
    Ring<D> ring;
    int begin, end;

    __device__ __forceinline__ int stage(int tile) const { return (tile - begin) % Kv::kStages; }
    __device__ __forceinline__ unsigned int keys(int tile) const { return ring.memory + stage(tile) * 2 * Kv::kBytes; }
    __device__ __forceinline__ unsigned int values(int tile) const { return keys(tile) + Kv::kBytes; }
    __device__ __forceinline__ void wait(int tile) const {
        wait_for_phase(ring.full(stage(tile)), (tile - begin) / Kv::kStages & 1);
    }
    __device__ __forceinline__ void release(int tile) const {
        if (threadIdx.x % 32 == 0) arrive(ring.empty(stage(tile)), 1);
    }
};

// Copy all tiles. Called by four threads: two copy the keys of every other KV block, two the
// values.
template <int D>
__device__ __forceinline__ void copy_tiles(const Tiles<D>& tiles, const TensorMap& cache, bool is_values, int first_block,
                                           const int* table, int n_kv_heads, int kv_head, int valid) {
    using Kv = KvTile<D>;
    constexpr int kBlocks = Kv::kKeys / kKvBlock, kEach = kBlocks / 2, kBoxBytes = kKvBlock * Kv::kRowBytes;
    int blocks[kEach];  // of the next tile; negative without positions before the end
    const auto look_up = [&](int tile) {
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const int at = tile * kBlocks + first_block + 2 * i;
            blocks[i] = at * kKvBlock < valid ? table[at] : -1;
        }
    };
    look_up(tiles.begin);
#pragma unroll 1
    for (int tile = tiles.begin; tile < tiles.end; ++tile) {
        const int stage = tiles.stage(tile), lap = (tile - tiles.begin) / Kv::kStages;
        if (lap) wait_for_phase(tiles.ring.empty(stage), lap - 1 & 1);
        expect_bytes(tiles.ring.full(stage), kEach * Kv::kPanels * kBoxBytes);
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const int row = blocks[i] < 0 ? 1 << 30 : (blocks[i] * n_kv_heads + kv_head) * kKvBlock;
            const unsigned int to = (is_values ? tiles.values(tile) : tiles.keys(tile)) + (first_block + 2 * i) * kBoxBytes;
#pragma unroll
            for (int panel = 0; panel < Kv::kPanels; ++panel)
                copy_box(to + panel * Kv::kPanelBytes, cache, panel * Kv::kColumns, row, tiles.ring.full(stage));
        }
        look_up(tile + 1);
    }
}

// Begin the scores of a warpgroup's queries.
template <int D>
__device__ __forceinline__ void begin_scores(Scores<D, 1>& scores, const Queries<D, 1>& queries, unsigned int keys) {
    using Kv = KvTile<D>;
    const auto first = descriptor<Kv::kRowBytes>(keys);
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        const auto b = advanced(first, 16 * k / Kv::kColumns * Kv::kPanelBytes + 16 * k % Kv::kColumns * 2);
        if (k == 0) mma_64xNx16<false>(scores[0], queries[0][k], b);
        else mma_64xNx16(scores[0], queries[0][k], b);
    }
    commit_mmas();
}

template <int D>
using Weights = unsigned int[keys_per_tile(D) / 16][4];  // fragments of A

// Begin to add weights · values to the sums.
template <int D>
__device__ __forceinline__ void begin_sums(Sums<D, 1>& sums, const Weights<D>& weights, unsigned int values) {
    using Kv = KvTile<D>;
    const auto first = descriptor<Kv::kRowBytes>(values, Kv::kPanelBytes);
#pragma unroll
    for (int k = 0; k < Kv::kKeys / 16; ++k)
        mma_64xNx16<true, true>(sums[0], weights[k], advanced(first, 16 * k * Kv::kRowBytes));
    commit_mmas();
}

template <int D>
__device__ __forceinline__ void to_fragments(Weights<D>& a, const Scores<D, 1>& weights) {
#pragma unroll
    for (int i = 0; i < keys_per_tile(D) / 4; ++i) {
        const float* pair = &weights[0][i / 4 * 2 + i / 2 % 2][i % 2 * 2];
        a[i / 4][i % 4] = floats_to_half2(pair[0], pair[1]);
    }
}

// Store zeros as the values from `valid` on of the last KV block. Called by all consumers, each
// before its last product with values.
template <int D>
__device__ __forceinline__ void clear_unwritten(const Tiles<D>& tiles, unsigned char* stages, int valid) {
    using Kv = KvTile<D>;
    const int last = tiles.end - 1, at = 16 * threadIdx.x;
    if (tiles.end * Kv::kKeys <= valid || valid % kKvBlock == 0) return;
    tiles.wait(last);
    if (at < (kKvBlock - valid % kKvBlock) * Kv::kRowBytes) {
        unsigned char* const to = stages + (tiles.values(last) - tiles.ring.memory) + valid % Kv::kKeys * Kv::kRowBytes + at;
#pragma unroll
        for (int panel = 0; panel < Kv::kPanels; ++panel)
            *reinterpret_cast<float4*>(to + panel * Kv::kPanelBytes) = make_float4(0.f, 0.f, 0.f, 0.f);
    }
    fence_shared_stores();
    asm volatile("bar.sync %0, %1;" ::"n"(1), "n"(kConsumers) : "memory");
}

template <int D>
__global__ void __launch_bounds__(kConsumers + 128, 1)
    attention_wgmma(unsigned int* y, const unsigned short* q, const __grid_constant__ TensorMap k_cache,
                    const __grid_constant__ TensorMap v_cache, const PrefillBatch batch, const float* sinks, int n_heads,
                    int n_kv_heads, int window) {
    using Kv = KvTile<D>;
    constexpr int kKeys = Kv::kKeys, kTiles = SEGMENT / kKeys;
    extern __shared__ __align__(16) unsigned char shared[];
    __shared__ unsigned long long barriers[2 * Kv::kStages];
    const PrefillSize size = *batch.size;
    if ((int)blockIdx.y >= size.wide_tiles) return;
    const PrefillTile queries_of = batch.tiles[size.tiles + blockIdx.y];
    const int head = blockIdx.x, kv_head = head / (n_heads / n_kv_heads), valid = queries_of.end;
    // The tiles that the 64 queries from a position on see.
    const auto oldest_tile = [=](int position) {
        return (window && position >= window ? position - window + 1 : 0) / kKeys;
    };
    const auto newest_tile = [=](int position) { return (min(position + kGroupRows, valid) - 1) / kKeys; };
    const Tiles<D> tiles{Ring<D>(shared, barriers), oldest_tile(queries_of.position),
                         newest_tile(queries_of.position + WIDE_TILE - kGroupRows) + 1};
    if (threadIdx.x == 0) tiles.ring.init(4, kConsumers / 32);
    __syncthreads();
    grid_dependency_wait();
    if (threadIdx.x >= kConsumers) {
        lower_registers<32>();
        const int warp = threadIdx.x / 32 % 4;
        if (threadIdx.x % 32 == 0)
            copy_tiles<D>(tiles, warp < 2 ? k_cache : v_cache, warp >= 2, warp % 2, batch.tables + queries_of.table,
                          n_kv_heads, kv_head, valid);
        return;
    }
    raise_registers<160>();
    unsigned char* const stages = shared + (tiles.ring.memory - (unsigned int)__cvta_generic_to_shared(shared));
    float4* const kept = reinterpret_cast<float4*>(stages + Kv::kStages * 2 * Kv::kBytes) +
                         threadIdx.x / 32 * partial_quads(D, 1);
    const int group_first = queries_of.position + threadIdx.x / 128 * kGroupRows;
    const int warp_first = group_first + threadIdx.x / 32 % 4 * 16, position = warp_first + threadIdx.x % 32 / 4;
    const int position_to_row = queries_of.row - queries_of.position, end_row = valid + position_to_row;
    const bool idle = group_first >= valid;
    const int first = idle ? tiles.end : oldest_tile(group_first), last = newest_tile(group_first);
    for (int tile = tiles.begin; tile < first; ++tile) {  // which only other warpgroups read
        tiles.wait(tile);
        tiles.release(tile);
    }
    if (idle) return clear_unwritten<D>(tiles, stages, valid);

    Queries<D, 1> queries;
    Softmax<D, 1> state;
    Scores<D, 1> scores;
    Weights<D> weights;
    const float scale = __fmul_rn(rsqrtf((float)D), kLog2e);
    const auto mask = [&](int tile) {
        if ((tile + 1) * kKeys > warp_first + 1 || (window && tile * kKeys < warp_first + 16 - window))
            apply_mask<D, 1>(scores, position, tile * kKeys, window, valid - 1);
    };
    load_queries<D, 1>(queries, q, position + position_to_row, end_row, head, n_heads);
    settle(queries[0]);
    tiles.wait(first);
    begin_mmas();
    begin_scores<D>(scores, queries, tiles.keys(first));
    wait_for_mmas<0>();
    settle(scores[0]);
    state.reset();
    mask(first);
    state.update(scores, scale);
    to_fragments<D>(weights, scores);
#pragma unroll 1
    for (int tile = first; tile < last; ++tile) {
        const unsigned int keys = __shfl_sync(0xffffffffu, tiles.keys(tile + 1), 0);  // in uniform registers
        const unsigned int values = __shfl_sync(0xffffffffu, tiles.values(tile), 0);
        tiles.wait(tile + 1);
        settle(weights);
        settle(state.sums[0]);
        begin_mmas();
        begin_scores<D>(scores, queries, keys);
        begin_sums<D>(state.sums, weights, values);
        wait_for_mmas<1>();
        settle(scores[0]);
        if ((tile + 1) % kTiles == 0) {  // the scores are those of a new segment
            wait_for_mmas<0>();
            settle(state.sums[0]);
            if (tile / kTiles > first / kTiles) state.merge_older(kept, scale);
            state.store(kept);
            state.reset();
        }
        mask(tile + 1);
        float factors[2];
        const bool rises = state.weigh(scores, scale, factors);
        wait_for_mmas<0>();
        settle(state.sums[0]);
        tiles.release(tile);
        if (rises) state.rescale(factors);
        to_fragments<D>(weights, scores);
    }
    clear_unwritten<D>(tiles, stages, valid);
    settle(weights);
    settle(state.sums[0]);
    begin_mmas();
    begin_sums<D>(state.sums, weights, tiles.values(last));
    wait_for_mmas<0>();
    settle(state.sums[0]);
    if (last / kTiles > first / kTiles) state.merge_older(kept, scale);
    const int end_strip = (end_row + 15) / 16 * 16;  // y of the rows after the chunk's tokens must be finite
    if (warp_first < valid)
        write_rows<D, 1>(state, y, sinks, scale, position + position_to_row, min(end_strip, size.rows), head, n_heads);
}
