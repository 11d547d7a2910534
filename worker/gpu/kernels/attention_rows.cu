// Decode attention of several rows, one new token each: for every row the bits of
// attention_decode.cu.
//
// attention_decode.cu has a block for each split that the longest context could need; here a fixed
// number of blocks processes a list of the splits that exist (attention_items.cu). The tiles, their
// division among warps, the splits and the order of all sums are those of attention_decode.cu: they
// depend on a row's position alone.
//
// The block that arrives last at a row's group adds the results of its splits, while the others
// already compute their next items; whether a block is last is evaluated in its next item.
//
// Inputs, outputs and scratch as in attention_decode.cu, and: list, the work list; splits = G;
// partials, R·(H/GROUP)·stored times partial_floats(D, GROUP) f32, where stored is the number of
// splits that the longest context can need. An inactive row writes zeros to y, q8 and meta, and no
// key or value.
// Grid: any number of blocks, one for each that fits on the device; block ROWS_THREADS. Dynamic
// shared memory: a ring of KV blocks for each warp (kv_ring.cuh).
// Alignment: q, caches and partials 16 bytes. Bytes: the visible keys and values once per GROUP
// heads; the partials stay in L2.
// Twin: as attention_decode.cu.
#include "arrival.cuh"
#include "kv_ring.cuh"
#include "pdl.cuh"
#include "rope.cuh"

// Four rotated elements of a query, times log2(e)/√D, as a fragment.
template <int D>
__device__ __forceinline__ uint4 rotated_query(const float4 x, const float4 partner, const Rotation (&rotations)[4]) {
    const float scale = __fmul_rn(rsqrtf((float)D), kLog2e);
    const auto scaled = [&](float from, float other, int i) {
        return __fmul_rn(rotate(from, other, rotations[i]), scale);
    };
    return Heads<D>::query(make_float4(scaled(x.x, partner.x, 0), scaled(x.y, partner.y, 1),
                                       scaled(x.z, partner.z, 2), scaled(x.w, partner.w, 3)));
}

// The warps of a tile that have a result: in the newest tile, those after the newest position have
// computed nothing.
template <class Shape>
__device__ __forceinline__ int warps_with_results(const SplitTiles& tiles) {
    return tiles.mine == tiles.tiles - 1 ? tiles.newest % Shape::kTile / Shape::kOfWarp + 1 : Shape::kTileWarps;
}

// The partial results of one split, one for each warp of a tile.
template <int D, int GROUP>
__device__ __forceinline__ void attend_split(const SplitTiles tiles, KvRing<D, GROUP>& ring, const uint4 (*queries)[32],
                                             const unsigned short* new_key, const unsigned short* new_value,
                                             float (*partials)[partial_floats(D, GROUP)]) {
    using Shape = RowShape<D, GROUP>;
#pragma unroll 1
    for (int part = 0; part < Shape::kParts; ++part) {
        Heads<D> heads;
        heads.reset();
#pragma unroll 1
        for (int tile = tiles.mine; tile < tiles.tiles; tile += tiles.splits) {
#pragma unroll 1
            for (int i = 0; i < Shape::kBlocks; ++i) {
                const int start = KvCursor<D, GROUP>::start_of(tiles, part, tile, i);
                if (!tiles.sees(start)) continue;
                ring.find();
                wait_for_copies<RING_SLOTS - 1>();
                __syncwarp();
                if (tiles.newest - start < kKvBlock) {
                    StagedKv<D>::insert(ring.first(), new_key, new_value, tiles.newest - start);
                    __syncwarp();
                }
                StagedFragments<D> kv(ring.first());
                heads.attend(kv, queries, start, tiles.oldest, tiles.newest);
                __syncwarp();
                ring.push();
            }
        }
        const int warp = threadIdx.x / 32 + part * Shape::kWarps;
        if (warp < warps_with_results<Shape>(tiles)) heads.store_partial(partials[warp], GROUP);
    }
}

template <int D, int GROUP, bool ADJACENT>
__global__ void __launch_bounds__(ROWS_THREADS, rows_blocks_of(D, GROUP))
    attention_rows(float* y, u8* q8, Meta* meta, const float* q, const float* k, const float* v,
                   unsigned short* k_cache, unsigned short* v_cache, const float* cos, const float* sin, int dims,
                   const int2* list, const int* tables, int table_stride, const float* sinks, float* partials,
                   unsigned int* arrivals, int n_heads, int n_kv_heads, int window, int splits, int stored) {
    using Shape = RowShape<D, GROUP>;
    constexpr int kPartial = partial_floats(D, GROUP), kSteps = Heads<D>::kSteps;
    constexpr int kArriving = D == 64 ? 160 : 224;  // a thread whose warp is mostly idle in the next item's start
    constexpr int kFirst = 2;  // few, since a block keeps its ring's state in registers
    static_assert(GROUP <= Shape::kWarps && GROUP * D / 4 <= ROWS_THREADS && D <= ROWS_THREADS, "see combine");
    __shared__ uint4 queries[kSteps][32];
    __shared__ __align__(16) float warp_partials[Shape::kTileWarps][kPartial];
    __shared__ float weights[GROUP][MAX_DECODE_SPLITS];
    __shared__ __align__(16) unsigned short new_key[D], new_value[D];
    __shared__ Entry current, previous;  // not in registers, where they would stay during attend_split
    __shared__ int current_index;
    __shared__ bool complete;            // the block has arrived last at the previous item's group
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, groups = n_heads / GROUP;
    // Read before the wait: the list, written by an earlier kernel of this graph that lets no other
    // start before (pdl.cuh, rule 5); block tables, written before this graph (rule 1); and KV of
    // earlier tokens.
    const DecodeItems items(list, groups);
    if ((int)blockIdx.x >= items.count) return;
    KvRing<D, GROUP> ring = {k_cache,    v_cache,           tables, table_stride,
                             n_kv_heads, groups / n_kv_heads, KvCursor<D, GROUP>(items, window, splits)};
    ring.fill();

    const RopeTables rope = {cos, sin, dims};
    const int query_row = lane / 4, e = Heads<D>::query_element(warp, lane);
    const auto final_rows = [=](int row, int head) {
        const size_t first = (size_t)row * n_heads * D;
        const float* sink = sinks ? sinks + head : nullptr;
        return FinalRows{y + first, q8 + first, meta + first / 32, sink, head * D, n_heads * D};
    };
    const auto tiles_of = [=](const Entry entry) {
        return SplitTiles(entry.position(), window, Shape::kTile, splits, entry.mine());
    };
    const auto partials_of = [=](int row, int group) {
        return partials + ((size_t)row * groups + group) * stored * kPartial;
    };
    Entry upcoming = items.first;
    int pending = -1;  // the group of an item that has arrived
#pragma unroll 1
    for (int index = blockIdx.x;; index += gridDim.x) {
        if (index < items.count) {
            const int head = index % groups * GROUP;
            const Entry entry = upcoming;
            const int newest = entry.position(), kv_head = head / (n_heads / n_kv_heads);
            // The first warps rotate the queries, the last ones write the newest key and value.
            const bool rotates = entry.active() && warp < kSteps;
            const bool writes = entry.active() && tiles_of(entry).has_newest();
            const int element = writes ? (int)threadIdx.x - (ROWS_THREADS - D) : -1;
            Rotation rotations[4], key_rotation;
            size_t new_row;
            if (rotates) {
#pragma unroll
                for (int i = 0; i < 4; ++i) rotations[i] = rotation_of<ADJACENT>(e + i, newest, rope);
            }
            if (element >= 0) {
                key_rotation = rotation_of<ADJACENT>(element, newest, rope);
                const int block = tables[(size_t)entry.slot() * table_stride + newest / kKvBlock];
                new_row = kv_offset<D>(block, n_kv_heads, kv_head, newest);
            }
            if (index == (int)blockIdx.x) {
                launch_dependents();
                grid_dependency_wait();
            }
            if (!entry.active()) {
                final_rows(entry.row(), head).template store_zeros<D, GROUP>();
                upcoming = items.entry(index + gridDim.x);
                continue;
            }
            if (threadIdx.x == 0) previous = current, current = entry, current_index = index;
            if (rotates) {
                float4 x = make_float4(0.f, 0.f, 0.f, 0.f), other = x;
                if (query_row < GROUP) {
                    const float* from = q + ((size_t)entry.row() * n_heads + head + query_row) * D;
                    x = *reinterpret_cast<const float4*>(from + e);
                    other = ADJACENT ? make_float4(x.y, x.x, x.w, x.z)
                                     : make_float4(from[rotations[0].partner], from[rotations[1].partner],
                                                   from[rotations[2].partner], from[rotations[3].partner]);
                }
                queries[warp][lane] = rotated_query<D>(x, other, rotations);
            }
            if (element >= 0) {
                const size_t at = ((size_t)entry.row() * n_kv_heads + kv_head) * D;
                const float key = rotate(k[at + element], k[at + key_rotation.partner], key_rotation);
                k_cache[new_row + element] = new_key[element] = float_to_half(clamp_to_half_range(key));
                v_cache[new_row + element] = new_value[element] = float_to_half(clamp_to_half_range(v[at + element]));
            }
        }
        __syncthreads();
        // The wait for an arrival overlaps with the start of the next item.
        if (pending >= 0 && complete) {
            const Entry entry = index < items.count ? previous : current;
            combine<D, GROUP, kFirst>(partials_of(entry.row(), pending), tiles_of(entry).active(), weights,
                                      final_rows(entry.row(), pending * GROUP));
        }
        pending = -1;
        if (index >= items.count) return;
        attend_split<D, GROUP>(tiles_of(current), ring, queries, new_key, new_value, warp_partials);
        __syncthreads();

        const SplitTiles tiles = tiles_of(current);
        index = current_index;
        upcoming = items.entry(index + gridDim.x);
        const int group = index % groups, row = current.row(), count = warps_with_results<Shape>(tiles);
        if (tiles.active() == 1) {
            combine<D, GROUP, kFirst>(warp_partials[0], count, weights, final_rows(row, group * GROUP));
            continue;
        }
        const Partial partial = {partials_of(row, group) + tiles.mine * kPartial};
        combine<D, GROUP, kFirst>(warp_partials[0], count, weights, partial);
        __syncthreads();
        const unsigned int others = tiles.active() - 1;
        if (threadIdx.x == kArriving) complete = arrive(arrivals + (size_t)row * groups + group, others) == others;
        pending = group;
    }
}
