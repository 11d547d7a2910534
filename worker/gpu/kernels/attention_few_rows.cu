// Decode attention of a few rows, one new token each: for every row the bits of
// attention_decode.cu.
//
// As attention_rows.cu, a fixed number of blocks processes a list of the splits that exist, and the
// block that arrives last at a row's group adds the results of its splits after its next item. But
// each part of a tile has a warp, which holds its keys and values in registers, as in
// attention_decode.cu: those of a block's first item are loaded before the wait, those of the next
// one before the results of an item are combined. An item takes less time, so this kernel is for so
// few items that a block has one or two; with more, the teams of attention_rows.cu read faster.
//
// Inputs, outputs and scratch as in attention_rows.cu, with an F16Kv cache. Shapes: those with 16
// parts of one KV block.
// Grid (H/Hk/GROUP, Hk, the `blocks` of attention_items), best at most one a multiprocessor; block
// 32 threads a part.
// Alignment: q, caches and partials 16 bytes. Bytes: the visible keys and values once per GROUP
// heads; the partials stay in L2.
// Twin: as attention_decode.cu.
#include "arrival.cuh"
#include "kv_ring.cuh"
#include "pdl.cuh"
#include "rope.cuh"
#include "team_parts.cuh"

template <int D, int GROUP, bool ADJACENT>
__global__ void __launch_bounds__(32 * warps_of(D, GROUP), 1)
    attention_few_rows(float* y, u8* q8, Meta* meta, const float* q, const float* k, const float* v,
                       unsigned short* k_cache, unsigned short* v_cache, const float* cos, const float* sin, int dims,
                       const int2* list, const int* tables, int table_stride, const float* sinks, float* partials,
                       unsigned int* arrivals, int n_heads, int n_kv_heads, int window, int splits, int stored,
                       const Q8Tiles tiles) {
    using Shape = RowShape<D, GROUP>;
    using Part = Parts<D, GROUP>;
    using Span = ItemSpan<D, GROUP>;
    constexpr int kThreads = 32 * Shape::kParts;
    static_assert(Shape::kBlocks == 1 && kThreads >= 32 * Heads<D, F16Kv>::kSteps + 32 + D, "see `rotates`, `element`");
    __shared__ uint4 queries[Heads<D, F16Kv>::kSteps][32];
    __shared__ __align__(16) float parts[Shape::kParts][Part::kFloats];
    __shared__ float weights[GROUP][MAX_DECODE_SPLITS];
    __shared__ __align__(16) F16Kv::Row<D> new_key, new_value;
    __shared__ int arrived_row, arrived_splits;  // of the previous item
    __shared__ bool complete;                    // this block has arrived last at its group
    const int kv_head = blockIdx.y, group = kv_head * gridDim.x + blockIdx.x, groups = gridDim.x * gridDim.y;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = group * GROUP;
    // Read before the wait: the list, block tables and KV of earlier tokens, as in
    // attention_rows.cu.
    const DecodeEntries entries(list);
    if ((int)blockIdx.z >= entries.stride) return;
    KvFragments<D, F16Kv> kv;
    // The KV block of this warp's part of a tile, negative if no position of it is visible.
    const auto find = [=](const Entry entry, const Span& span, int tile) {
        const int start = tile + warp * kKvBlock;
        return entry.active() && span.sees(start) ? tables[entry.slot() * table_stride + start / kKvBlock] : -1;
    };
    const auto load = [&](int block, const Span& span, int tile) {
        if (block < 0) return;
        const size_t at = F16Kv::row<D>(block, n_kv_heads, kv_head, 0);
        kv.template load<true>(k_cache + at, v_cache + at, tile + warp * kKvBlock, span.oldest, span.newest);
    };
    Entry upcoming = entries.first;
    {
        const Span span(upcoming, window);
        load(find(upcoming, span, span.first), span, span.first);
    }
    const RopeTables rope = {cos, sin, dims};
    const auto final_rows = [=](int row) {
        const size_t first = (size_t)row * n_heads * D;
        return FinalRows{y + first, q8 + first,      meta + first / 32, sinks ? sinks + head : nullptr,
                         head * D,  n_heads * D, tiles,             row};
    };
    const auto partials_of = [=](int row) {
        return partials + ((size_t)row * groups + group) * stored * Part::kFloats;
    };
    bool pending = false;                                    // the previous item has partial results of its row
    const bool arriving = threadIdx.x == kThreads - D - 32;  // its warp has nothing to rotate
    unsigned int arrived_before = 0;                         // of that thread
    const int query_row = lane / 4, e = Heads<D, F16Kv>::query_element(warp, lane);
    Rotation rotations[4], key_rotation;
    size_t new_row = 0;
#pragma unroll 1
    for (int index = blockIdx.z;; index += entries.stride) {
        const Entry entry = upcoming;
        const bool more = index < entries.count;
        if (!more && !pending) return;
        upcoming = entries[index + entries.stride];
        const Span span(entry, window), next(upcoming, window);
        const bool active = more && entry.active();
        // The first warps rotate the queries, the last ones write the newest key and value.
        const bool rotates = active && warp < Heads<D, F16Kv>::kSteps;
        const int element = active && span.has_newest(splits) ? (int)threadIdx.x - (kThreads - D) : -1;
        if (rotates) {
#pragma unroll
            for (int i = 0; i < 4; ++i) rotations[i] = rotation_of<ADJACENT>(e + i, span.newest, rope);
        }
        if (element >= 0) {
            key_rotation = rotation_of<ADJACENT>(element, span.newest, rope);
            const int block = tables[entry.slot() * table_stride + span.newest / kKvBlock];
            new_row = F16Kv::row<D>(block, n_kv_heads, kv_head, span.newest) + element;
        }
        if (index == (int)blockIdx.z) {
            launch_dependents();
            grid_dependency_wait();
        }
        if (more && !active) {
            final_rows(entry.row()).template store_zeros<D, GROUP>();
            load(find(upcoming, next, next.first), next, next.first);
            continue;
        }
        if (rotates) {
            float4 x = make_float4(0.f, 0.f, 0.f, 0.f), other = x;
            if (query_row < GROUP) {
                const float* from = q + ((size_t)entry.row() * n_heads + head + query_row) * D;
                x = *reinterpret_cast<const float4*>(from + e);
                other = ADJACENT ? make_float4(x.y, x.x, x.w, x.z)
                                 : make_float4(from[rotations[0].partner], from[rotations[1].partner],
                                               from[rotations[2].partner], from[rotations[3].partner]);
            }
            const float scale = __fmul_rn(rsqrtf((float)D), kLog2e);
            const auto scaled = [&](float from, float partner, int i) {
                return __fmul_rn(rotate(from, partner, rotations[i]), scale);
            };
            queries[warp][lane] = Heads<D, F16Kv>::query(make_float4(scaled(x.x, other.x, 0), scaled(x.y, other.y, 1),
                                                              scaled(x.z, other.z, 2), scaled(x.w, other.w, 3)));
        }
        if (element >= 0) {
            const size_t at = ((size_t)entry.row() * n_kv_heads + kv_head) * D;
            const float key = rotate(k[at + element], k[at + key_rotation.partner], key_rotation);
            k_cache[new_row] = new_key.elements[element] = float_to_half(clamp_to_half_range(key));
            v_cache[new_row] = new_value.elements[element] = float_to_half(clamp_to_half_range(v[at + element]));
        }
        __syncthreads();
        if (more) {
            Heads<D, F16Kv> heads;
            heads.reset();
#pragma unroll 1
            for (int tile = span.first; tile <= span.newest; tile += splits * Shape::kTile) {
                const int start = tile + warp * kKvBlock;
                if (!span.sees(start)) continue;
                if (tile != span.first) load(find(entry, span, tile), span, tile);
                kv.insert_newest(new_key, new_value, start, span.newest);
                heads.attend(kv, queries, start, span.oldest, span.newest);
            }
            const int block = find(upcoming, next, next.first);
            if (warp < span.parts) heads.template store_partial<Part::kRow>(parts[warp], GROUP);
            load(block, next, next.first);
        }
        // The result of the atomic is needed only here: the thread does not wait for it before.
        if (pending && arriving) complete = (int)arrived_before == arrived_splits - 1;
        __syncthreads();
        // First the splits of the previous item's row, if this block has arrived last, then this
        // item.
        const int active_splits = span.active(splits);
        bool arrives = false;
#pragma unroll 1
        for (int own = pending && complete ? 0 : 1; own < 1 + more; ++own) {
            const float* const results = own ? parts[0] : partials_of(arrived_row);
            arrives = own && active_splits > 1;
            Part::combine(results, own ? span.parts : arrived_splits, weights,
                          final_rows(own ? entry.row() : arrived_row),
                          arrives ? partials_of(entry.row()) + entry.mine() * Part::kFloats : nullptr);
            if (!own || arrives) __syncthreads();
        }
        if (!more) return;
        if (arrives && arriving) {
            arrived_row = entry.row(), arrived_splits = active_splits;
            arrived_before = arrive(arrivals + (size_t)entry.row() * groups + group, active_splits - 1);
        }
        pending = arrives;
    }
}
