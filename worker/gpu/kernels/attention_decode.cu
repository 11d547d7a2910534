// One generated token a sequence: RoPE of q and k, the KV write, and attention over the cache, split over its length.
//
//   y_h = Σ_p softmax_p(q_h · k_p / √D) v_p   over positions max(0, t-window+1) … t; a sink logit joins the denominator.
// Flash-decoding (Dao et al. 2023): positions are cut into splits of 128 or 256 at absolute multiples of that. Block g of
// the grid takes the splits s ≡ g (mod G) by online softmax, the block that arrives last adds the blocks' parts in the order of
// their oldest split. G is fixed at load, so the arithmetic follows from the position alone.
//
// q [S, H·D], k, v [S, Hk·D] f32; y [S, H·D] f32 and the same rows as q8, meta (quantized.cuh); caches as in kv_cache.cuh;
// tables [S, table_stride] i32, positions [S] i32; sinks [H] f32 or null. parts: S·(H/GROUP)·G of
// part_floats f32; arrivals: S·(H/GROUP) u32, zeros before and after. q, caches and parts are 16-byte aligned.
// Grid (G, H/GROUP, S), 32·warps_of(D, GROUP) threads: GROUP ≤ 8 query heads share one KV head; a warp takes a KV block or two
// of a split (decode_heads.cuh), all their keys and values in flight together, those of a block's first split before the
// queries are there (pdl.cuh). Bytes: the keys and values that are seen, once per GROUP heads; the parts stay in L2.
// Twin: `attend` in worker/cpu/attention.py with an f16 cache, `quantize` in worker/cpu/quantized.py.
#include "arrival.cuh"
#include "decode_heads.cuh"
#include "pdl.cuh"
#include "rope.cuh"

// Warps of a block, KV blocks of a split that each takes, and blocks of a multiprocessor. Where two fit, one finds room
// beside the blocks of the product before it, and its keys and values are on their way while those still work. Groups of
// more heads take twice the warps all the same: the longer a context, the more they have to add (docs/performance-decode.md).
__host__ __device__ constexpr bool is_wide(int head_dim, int group) { return head_dim == 64 && group > 4; }
__host__ __device__ constexpr int warps_of(int head_dim, int group) { return is_wide(head_dim, group) ? 16 : 8; }
__host__ __device__ constexpr int pieces_of(int head_dim, int group) { return head_dim == 64 && group <= 4 ? 2 : 1; }
__host__ __device__ constexpr int blocks_of(int head_dim, int group) {
    return head_dim == 128 || is_wide(head_dim, group) ? 1 : 2;
}

// Which splits of a sequence this block takes: those of `periods` that lie `mine` after the first one.
struct Share {
    int newest, oldest, first, splits, periods, mine;

    __device__ __forceinline__ Share(int position, int window, int split)
        : newest(position), oldest(window && position >= window ? position - window + 1 : 0), first(oldest / split),
          splits(newest / split - first + 1), periods(gridDim.x) {
        const int turn = blockIdx.x - (first < periods ? first : first % periods);
        mine = turn < 0 ? turn + periods : turn;
    }
    __device__ __forceinline__ bool has_newest() const {
        return splits <= periods ? mine == splits - 1 : (splits - 1 - mine) % periods == 0;
    }
    __device__ __forceinline__ bool sees(int start) const { return start <= newest && start + kKvBlock > oldest; }
};

template <int D, int GROUP, bool ADJACENT>
__global__ void __launch_bounds__(32 * warps_of(D, GROUP), blocks_of(D, GROUP))
    attention_decode(float* y, u8* q8, Meta* meta, const float* q, const float* k, const float* v,
                     unsigned short* k_cache, unsigned short* v_cache, const float* cos, const float* sin, int dims,
                     const int* positions, const int* tables, int table_stride, const float* sinks, float* parts,
                     unsigned int* arrivals, int n_heads, int n_kv_heads, int window) {
    constexpr int kPart = part_floats(D, GROUP), kWarps = warps_of(D, GROUP), kThreads = 32 * kWarps;
    constexpr int kPieces = pieces_of(D, GROUP), kOfWarp = kPieces * kKvBlock, kSplit = kWarps * kOfWarp;
    static_assert(GROUP <= kWarps, "combine takes a warp a head");
    __shared__ uint4 queries[Heads<D>::kSteps][32];
    __shared__ __align__(16) float block_parts[kWarps][kPart];
    __shared__ union {
        float warps[GROUP][kWarps], blocks[GROUP][kMaxParts];
    } weights;
    __shared__ __align__(16) unsigned short new_key[D], new_value[D];
    const int sequence = blockIdx.z, head = blockIdx.y * GROUP, kv_head = head / (n_heads / n_kv_heads);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Share share(positions[sequence], window, kSplit);
    if (share.mine >= share.splits) return;
    const int newest = share.newest;
    const int* table = tables + (size_t)sequence * table_stride;
    const auto start_of = [&](int split, int piece) {
        return (share.first + split) * kSplit + warp * kOfWarp + piece * kKvBlock;
    };
    KvPiece<D> pieces[kPieces];
    const auto load = [&](int split) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            const int start = start_of(split, i);
            if (!share.sees(start)) continue;
            const size_t at = kv_offset<D>(table[start / kKvBlock], n_kv_heads, kv_head, start);
            pieces[i].load(k_cache + at, v_cache + at, start, share.oldest, newest);
        }
    };
    load(share.mine);

    // The first warps turn the queries, the last ones bring the newest key and value, whose readers are all in one block.
    const RopeTables rope = {cos, sin, dims};
    const bool turning = warp < Heads<D>::kSteps;
    const int of = lane / 4, e = Heads<D>::query_element(warp, lane);
    const int element = share.has_newest() ? (int)threadIdx.x - (kThreads - D) : -1;
    Turn turns[4], key_turn;
    if (turning) {
#pragma unroll
        for (int i = 0; i < 4; ++i) turns[i] = turn_of<ADJACENT>(e + i, newest, rope);
    }
    if (element >= 0) key_turn = turn_of<ADJACENT>(element, newest, rope);
    const size_t slot = kv_offset<D>(table[newest / kKvBlock], n_kv_heads, kv_head, newest);
    launch_dependents();
    grid_dependency_wait();
    if (turning) {
        float4 x = make_float4(0.f, 0.f, 0.f, 0.f), other = x;
        if (of < GROUP) {
            const float* from = q + ((size_t)sequence * n_heads + head + of) * D;
            x = *reinterpret_cast<const float4*>(from + e);
            other = ADJACENT ? make_float4(x.y, x.x, x.w, x.z)
                             : make_float4(from[turns[0].partner], from[turns[1].partner], from[turns[2].partner],
                                           from[turns[3].partner]);
        }
        const float scale = rsqrtf((float)D) * kLog2e;
        queries[warp][lane] = Heads<D>::query(
            make_float4(turned(x.x, other.x, turns[0]) * scale, turned(x.y, other.y, turns[1]) * scale,
                        turned(x.z, other.z, turns[2]) * scale, turned(x.w, other.w, turns[3]) * scale));
    }
    if (element >= 0) {
        const size_t row = ((size_t)sequence * n_kv_heads + kv_head) * D;
        const float key = turned(k[row + element], k[row + key_turn.partner], key_turn);
        k_cache[slot + element] = new_key[element] = float_to_half(clamp_to_half_range(key));
        v_cache[slot + element] = new_value[element] = float_to_half(clamp_to_half_range(v[row + element]));
    }
    __syncthreads();

    Heads<D> heads;
    heads.begin();
    for (int split = share.mine; split < share.splits; split += share.periods) {
        if (split != share.mine) load(split);
#pragma unroll 1  // code that is not in the instruction cache costs more than moving a piece
        for (int i = 0; i < kPieces; ++i) {
            const int start = start_of(split, i);
            if (share.sees(start)) {
                pieces[0].take(new_key, new_value, start, newest);
                heads.attend(pieces[0], queries, start, share.oldest, newest);
            }
            pieces[0] = pieces[kPieces - 1];
        }
    }
    // Of the newest split alone, warps behind the newest position saw nothing.
    const int warps = share.mine == share.splits - 1 ? newest % kSplit / kOfWarp + 1 : kWarps;
    if (warp < warps) heads.leave(block_parts[warp], GROUP);
    __syncthreads();

    const int active = min(share.splits, share.periods);
    const size_t row = (size_t)sequence * n_heads * D, group = (size_t)sequence * gridDim.y + blockIdx.y;
    const Result result = {y + row, q8 + row, meta + row / 32, sinks ? sinks + head : nullptr, head * D, n_heads * D};
    if (active == 1) {
        combine<D, GROUP>(block_parts[0], warps, weights.warps, result);
        return;
    }
    parts += group * share.periods * kPart;
    combine<D, GROUP>(block_parts[0], warps, weights.warps, NextPart{parts + share.mine * kPart});
    if (arrives_last(arrivals + group, active)) combine<D, GROUP>(parts, active, weights.blocks, result);
}
