// One generated token a sequence: RoPE of q and k, the KV write, and attention over the cache, split over its length.
//
//   y_h = Σ_p softmax_p(q_h · k_p / √D) v_p   over positions max(0, t-window+1) … t; a sink logit joins the denominator.
// Flash-decoding (Dao et al. 2023): positions are cut into splits of 128 or 256 at absolute multiples of that. Block g of
// the grid takes the splits s ≡ g (mod G) by online softmax, the block that arrives last adds the blocks' parts in the order of
// their oldest split. G is fixed at load, so the arithmetic follows from the position alone.
//
// q [S, H·D], k, v [S, Hk·D] f32; y [S, H·D] f32 and the same rows as q8, meta (quantized.cuh); caches as in kv_cache.cuh;
// tables [S, table_stride] i32, positions [S] i32; sinks [H] f32 or null. parts: S·(H/GROUP)·G of
// part_floats f32; arrivals: S·(H/GROUP) u32, zeros before and after. Caches and parts are 16-byte aligned.
// Grid (G, H/GROUP, S), 512 threads (D = 64) or 256: GROUP ≤ 8 query heads share one KV head; a warp takes one KV block of a split
// (decode_heads.cuh), all its keys and values in flight together, those of a block's first split before the queries are
// there (early.cuh). Bytes: the keys and values that are seen, once per GROUP heads, plus the parts, which stay in L2.
// Twin: `attend` in worker/cpu/attention.py with an f16 cache, `quantize` in worker/cpu/quantized.py.
#include "arrival.cuh"
#include "decode_heads.cuh"
#include "early.cuh"
#include "rope.cuh"

// Warps of a block and blocks of a multiprocessor: as many as the registers of a warp's KV block allow.
__host__ __device__ constexpr int warps_of(int head_dim) { return head_dim == 64 ? 16 : 8; }
__host__ __device__ constexpr int blocks_of(int head_dim) { return head_dim == 96 ? 2 : 1; }

template <int D, int GROUP, bool ADJACENT>
__global__ void __launch_bounds__(32 * warps_of(D), blocks_of(D))
    attention_decode(float* y, u8* q8, Meta* meta, const float* q, const float* k, const float* v,
                     unsigned short* k_cache, unsigned short* v_cache, const float* cos, const float* sin, int dims,
                     const int* positions, const int* tables, int table_stride, const float* sinks, float* parts,
                     unsigned int* arrivals, int n_heads, int n_kv_heads, int window) {
    constexpr int kPart = part_floats(D, GROUP), kWarps = warps_of(D), kSplit = kWarps * kKvBlock;
    __shared__ uint4 queries[Heads<D>::kSteps][32];
    __shared__ __align__(16) float block_parts[kWarps][kPart];
    __shared__ float weights[GROUP][kMaxParts];
    __shared__ __align__(16) unsigned short new_key[D], new_value[D];
    const int sequence = blockIdx.z, head = blockIdx.y * GROUP, kv_head = head / (n_heads / n_kv_heads);
    const int warp = threadIdx.x / 32, periods = gridDim.x;
    const int newest = positions[sequence], oldest = window && newest >= window ? newest - window + 1 : 0;
    const int first = oldest / kSplit, splits = newest / kSplit - first + 1, active = min(splits, periods);
    const int mine = (blockIdx.x - first % periods + periods) % periods;  // this block's first split, counted from `first`
    if (mine >= splits) return;
    const int* table = tables + (size_t)sequence * table_stride;
    const RopeTables rope = {cos, sin, dims};
    const auto start_of = [&](int split) { return (first + split) * kSplit + warp * kKvBlock; };
    const auto seen = [&](int start) { return start <= newest && start + kKvBlock > oldest; };
    Heads<D> heads;
    const auto load = [&](int start) {
        if (!seen(start)) return;
        const size_t at = kv_offset<D>(table[start / kKvBlock], n_kv_heads, kv_head, start);
        heads.load(k_cache + at, v_cache + at, start, oldest, newest);
    };
    load(start_of(mine));
    wait_for_inputs();

    const float* from = q + ((size_t)sequence * n_heads + head) * D;
    const float scale = rsqrtf((float)D) * kLog2e;
    for (int at = threadIdx.x; at < Heads<D>::kSteps * 32; at += blockDim.x) {
        const int of = at % 32 / 4, e = Heads<D>::query_element(at / 32, at % 32);
        float x[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (of < GROUP) x[i] = rotated<ADJACENT>(from + of * D, e + i, newest, rope) * scale;
        queries[at / 32][at % 32] = Heads<D>::query(make_float4(x[0], x[1], x[2], x[3]));
    }
    if ((splits - 1 - mine) % periods == 0) {  // the newest split is here: so are its readers, all in this block
        const size_t at = ((size_t)sequence * n_kv_heads + kv_head) * D;
        const size_t to = kv_offset<D>(table[newest / kKvBlock], n_kv_heads, kv_head, newest);
        for (int e = threadIdx.x; e < D; e += blockDim.x) {
            const float key = rotated<ADJACENT>(k + at, e, newest, rope);
            k_cache[to + e] = new_key[e] = float_to_half(clamp_to_half_range(key));
            v_cache[to + e] = new_value[e] = float_to_half(clamp_to_half_range(v[at + e]));
        }
    }
    __syncthreads();

    heads.begin();
    for (int split = mine; split < splits; split += periods) {
        const int start = start_of(split);
        if (split != mine) load(start);
        if (!seen(start)) continue;
        heads.take(new_key, new_value, start, newest);
        heads.attend(queries, start, oldest, newest);
    }
    heads.leave(block_parts[warp], GROUP);
    __syncthreads();

    const size_t row = (size_t)sequence * n_heads * D, group = (size_t)sequence * gridDim.y + blockIdx.y;
    const Result result = {y + row, q8 + row, meta + row / 32, sinks ? sinks + head : nullptr, head * D, n_heads * D};
    parts += group * periods * kPart;
    combine<D, GROUP>(block_parts[0], kWarps, 0, kWarps, weights, parts + blockIdx.x * kPart,
                      active == 1 ? result : Result{});
    if (active == 1) return;
    if (!arrives_last(arrivals + group, active)) return;
    combine<D, GROUP>(parts, active, first % periods, periods, weights, nullptr, result);
}
