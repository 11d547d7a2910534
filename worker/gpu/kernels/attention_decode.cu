// Decode attention of one new token: norms of heads, RoPE of q and k, KV write, split-KV attention.
//
//   y_h = Σ_p softmax_p(q_h · k_p / √D) v_p   over positions max(0, t-window+1) … t
// A sink logit, if any, joins the denominator. With Norms (HeadNorms) the heads of q, k and v are
// normalized first (head_norm.cuh), in each block that reads them; v may be k.
// Flash-decoding (Dao et al. 2023, https://pytorch.org/blog/flash-decoding): the positions are cut
// into tiles of 128 or 256 at absolute multiples of the tile. Block g of the grid computes the
// tiles s ≡ g (mod G) by online softmax; the block that arrives last adds the blocks' partial
// results in the order of their oldest tile. G is a constant of the model's shape
// (worker/gpu/decode_attention.py: decode_splits), so the order of the sums depends on the position
// alone, never on the device.
//
// Inputs: q [H·D], k, v [Hk·D] f32, or null: an earlier layer has written them to the cache; caches
// as in kv_cache.cuh; row_slot i32, or null: slot 0; of the slots, positions [S] i32 and tables
// [S, table_stride] i32; cos, sin [context, dims/2] f32; sinks [H] f32 or null.
// Outputs: y [H·D] f32, and the same row quantized as q8, meta (q8_activations.cuh); the new key
// and value. The row is inactive if its slot or the slot's position is negative, or if the position
// lies beyond the table: nothing is written then.
// Scratch: partials, (H/GROUP)·G times partial_floats(D, GROUP) f32; arrivals, H/GROUP u32, zero
// before and after each launch.
// Grid (G, H/Hk/GROUP, Hk), block 32·warps_of(D, GROUP): GROUP ≤ 8 query heads of one KV head. A
// warp computes one or two KV blocks of a tile (decode_heads.cuh) and loads all their keys and
// values at once; those of a block's first tile are loaded before the wait (pdl.cuh). With D = 256
// it loads the values of a KV block after its scores, and GROUP ≤ 4.
// Alignment: q, caches and partials 16 bytes. Bytes: the visible keys and values once per GROUP
// heads; the partials stay in L2.
// Twin: `attend` in worker/cpu/attention.py with an f16 cache, `quantize` in
// tests/quantized_ops.py.
#include "arrival.cuh"
#include "decode_heads.cuh"
#include "decode_splits.cuh"
#include "head_norm.cuh"
#include "pdl.cuh"
#include "rope.cuh"

template <int D, int GROUP, bool ADJACENT, class Kv, class... Norms>
__global__ void __launch_bounds__(32 * warps_of(D, GROUP), blocks_of(D, GROUP))
    attention_decode(float* y, u8* q8, Meta* meta, const float* q, const float* k, const float* v,
                     typename Kv::Element* k_cache, typename Kv::Element* v_cache, const float* cos, const float* sin,
                     int dims, const int* row_slot, const int* positions, const int* tables, int table_stride,
                     const float* sinks, float* partials, unsigned int* arrivals, int n_heads, int n_kv_heads,
                     int window, Norms... norms) {
    constexpr int kPartial = partial_floats(D, GROUP), kWarps = warps_of(D, GROUP), kThreads = 32 * kWarps;
    constexpr int kBlocks = kv_blocks_of(D, GROUP), kOfWarp = kBlocks * kKvBlock, kTile = kWarps * kOfWarp;
    constexpr bool kNormed = sizeof...(Norms) > 0;
    static_assert(GROUP <= kWarps, "combine computes the weights of a head in one warp");
    __shared__ uint4 queries[Heads<D, Kv>::kSteps][32];
    __shared__ __align__(16) float warp_partials[kWarps][kPartial];
    __shared__ union {
        float warps[GROUP][kWarps], blocks[GROUP][MAX_DECODE_SPLITS];
    } weights;
    __shared__ __align__(16) typename Kv::template Row<D> new_key, new_value;
    const int kv_head = blockIdx.z, group = kv_head * gridDim.y + blockIdx.y, head = group * GROUP;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // row_slot, positions and tables may be read before the wait: a graph holds one step, and they
    // are written before it, by a copy or the preceding step's sampler (pdl.cuh, rule 1). The
    // position of slot 0 is loaded in any case: without row_slot, no branch delays it.
    int position = positions[0];
    if (row_slot) {
        const int slot = *row_slot;
        position = slot < 0 ? -1 : positions[slot];
        tables += (size_t)max(slot, 0) * table_stride;
    }
    const SplitTiles tiles = SplitTiles::of_split(position, window, kTile, gridDim.x, blockIdx.x);
    if (tiles.mine >= tiles.tiles || position >= table_stride * kKvBlock) return;
    const int newest = tiles.newest;
    const auto start_of = [&](int tile, int i) {
        return (tiles.first + tile) * kTile + warp * kOfWarp + i * kKvBlock;
    };
    using Fragments = KvFragments<D, Kv>;
    // Codes take half the registers of f16: the next tile's are loaded while a tile is computed.
    constexpr bool kAhead = Kv::kQuantized && kBlocks == 1 && D <= 128;
    Fragments kv[kBlocks];
    const auto load = [&](Fragments(&to)[kBlocks], int tile) {
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
            const int start = start_of(tile, i);
            if (!tiles.sees(start)) continue;
            const size_t at = Kv::template row<D>(tables[start / kKvBlock], n_kv_heads, kv_head, start);
            to[i].load(k_cache + at, v_cache + at, start, tiles.oldest, newest);
        }
    };
    load(kv, tiles.mine);

    // The first warps rotate the queries, the last ones write the newest key and value; one block
    // reads those.
    const RopeTables rope = {cos, sin, dims};
    const bool rotates = warp < Heads<D, Kv>::kSteps;
    const int row = lane / 4, e = Heads<D, Kv>::query_element(warp, lane);
    const int element = tiles.has_newest() && !Kv::kQuantized ? (int)threadIdx.x - (kThreads - D) : -1;
    // With codes a warp writes the key and another one the value.
    const int own = tiles.has_newest() && Kv::kQuantized ? kWarps - warp : 0;
    const bool is_key = own == 1, is_value = own == 2;
    WarpRotation<D, ADJACENT> warp_rotation;
    constexpr bool kTwoSteps = Heads<D, Kv>::kSteps > kWarps;  // of each warp
    const int second = Heads<D, Kv>::query_element(warp + kWarps, lane);
    Rotation rotations[4], second_rotations[4], key_rotation;
    if (rotates) load_rotations<ADJACENT>(rotations, e, newest, rope);
    if constexpr (kTwoSteps) load_rotations<ADJACENT>(second_rotations, second, newest, rope);
    if (element >= 0) key_rotation = rotation_of<ADJACENT>(element, newest, rope);
    if (is_key) warp_rotation.load(newest, rope);
    const size_t new_row = Kv::template row<D>(tables[newest / kKvBlock], n_kv_heads, kv_head, newest);
    NormedGroup<D, GROUP, kWarps> normed;
    if constexpr (kNormed) normed.load_weights(tiles.has_newest(), norms...);
    launch_dependents();
    grid_dependency_wait();
    const int first = kNormed ? 0 : head;
    if constexpr (kNormed) {
        float* const heads = warp_partials[0];  // until the next barrier
        normed.normalize(tiles.has_newest(), q + head * D, k + kv_head * D, v + kv_head * D, heads, norms...);
        q = heads, k = heads + normed.kKey * D, v = heads + normed.kValue * D;
    }
    if (rotates) {
        float4 x = make_float4(0.f, 0.f, 0.f, 0.f), other = x;
        if (row < GROUP) {
            const float* from = q + (first + row) * D;
            x = *reinterpret_cast<const float4*>(from + e);
            other = ADJACENT ? make_float4(x.y, x.x, x.w, x.z)
                             : make_float4(from[rotations[0].partner], from[rotations[1].partner],
                                           from[rotations[2].partner], from[rotations[3].partner]);
        }
        const float scale = __fmul_rn(rsqrtf((float)D), kLog2e);
        const auto scaled = [&](float from, float partner, int i) {
            return __fmul_rn(rotate(from, partner, rotations[i]), scale);
        };
        queries[warp][lane] = Heads<D, Kv>::query(make_float4(scaled(x.x, other.x, 0), scaled(x.y, other.y, 1),
                                                          scaled(x.z, other.z, 2), scaled(x.w, other.w, 3)));
    }
    if constexpr (kTwoSteps) {
        static_assert(Heads<D, Kv>::kSteps == 2 * kWarps && GROUP <= 8);
        float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
        if (row < GROUP) x = rotated<ADJACENT>(q + (first + row) * D, second, second_rotations);
        const float scale = __fmul_rn(rsqrtf((float)D), kLog2e);
        queries[warp + kWarps][lane] = Heads<D, Kv>::query(make_float4(__fmul_rn(x.x, scale), __fmul_rn(x.y, scale),
                                                                   __fmul_rn(x.z, scale), __fmul_rn(x.w, scale)));
    }
    if constexpr (Kv::kQuantized) {
        const size_t block = new_row - newest % kKvBlock * D;
        const int from = kNormed ? 0 : kv_head * D;
        float x[D / 32];
        if (!k) {  // written by an earlier layer
            if (is_key) copy_row<D>(new_key, k_cache + block, newest);
            if (is_value) copy_row<D>(new_value, v_cache + block, newest);
        } else if (is_key) {
            warp_rotation.rotate_head(x, k + from);
            const Q8Row<D> row(x);
            row.store(k_cache + block, newest), row.store(new_key);
        } else if (is_value) {
#pragma unroll
            for (int i = 0; i < D / 32; ++i) x[i] = v[from + lane + 32 * i];
            const Q8Row<D> row(x);
            row.store(v_cache + block, newest), row.store(new_value);
        }
    } else if (element >= 0 && !k) {  // written by an earlier layer
        new_key.elements[element] = __ldcg(k_cache + new_row + element);
        new_value.elements[element] = __ldcg(v_cache + new_row + element);
    } else if (element >= 0) {
        const int at = kNormed ? 0 : kv_head * D;
        const float key = rotate(k[at + element], k[at + key_rotation.partner], key_rotation);
        k_cache[new_row + element] = new_key.elements[element] = float_to_half(clamp_to_half_range(key));
        v_cache[new_row + element] = new_value.elements[element] = float_to_half(clamp_to_half_range(v[at + element]));
    }
    __syncthreads();

    Heads<D, Kv> heads;
    heads.reset();
    for (int tile = tiles.mine; tile < tiles.tiles; tile += tiles.splits) {
        Fragments next[kBlocks];
        if constexpr (!kAhead) {
            if (tile != tiles.mine) load(kv, tile);
        } else if (tile + tiles.splits < tiles.tiles) {
            load(next, tile + tiles.splits);
        }
#pragma unroll 1  // unrolled code misses the instruction cache: dearer than moving registers
        for (int i = 0; i < kBlocks; ++i) {
            const int start = start_of(tile, i);
            if (tiles.sees(start)) {
                kv[0].insert_newest(new_key, new_value, start, newest);
                if constexpr (Fragments::kLateValues) {
                    const size_t at = Kv::template row<D>(tables[start / kKvBlock], n_kv_heads, kv_head, start);
                    heads.attend(kv[0], queries, start, tiles.oldest, newest, [&](int i) {
                        kv[0].load_late_values(i, v_cache + at, new_value.elements, start, tiles.oldest, newest);
                    });
                } else {
                    heads.attend(kv[0], queries, start, tiles.oldest, newest);
                }
            }
            kv[0] = kv[kBlocks - 1];
        }
        if constexpr (kAhead) {
#pragma unroll
            for (int i = 0; i < kBlocks; ++i) kv[i] = next[i];
        }
    }
    // In the newest tile, warps after the newest position have computed nothing.
    const int warps = tiles.mine == tiles.tiles - 1 ? newest % kTile / kOfWarp + 1 : kWarps;
    if (warp < warps) heads.store_partial(warp_partials[warp], GROUP);
    __syncthreads();

    const int active = tiles.active();
    const FinalRows result = {y, q8, meta, sinks ? sinks + head : nullptr, head * D, n_heads * D, {}, 0};
    if (active == 1) {
        combine<D, GROUP>(warp_partials[0], warps, weights.warps, result);
        return;
    }
    partials += group * tiles.splits * kPartial;
    combine<D, GROUP>(warp_partials[0], warps, weights.warps, Partial{partials + tiles.mine * kPartial});
    if (arrives_last(arrivals + group, active)) combine<D, GROUP>(partials, active, weights.blocks, result);
}
