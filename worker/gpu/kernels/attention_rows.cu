// Decode attention of several rows, one new token each: for every row the bits of
// attention_decode.cu. For a few rows of large groups, attention_few_rows.cu takes less time.
//
// attention_decode.cu has a block for each split that the longest context could need; here a fixed
// number of blocks processes a list of the splits that exist (attention_items.cu). The tiles, their
// division into parts, the splits and the order of all sums are those of attention_decode.cu: they
// depend on a row's position alone. A block is a team of 1 to TEAM_WARPS warps that divides the
// parts of an item: few warps if there are many items, since what an item costs besides its
// positions is then hidden by the other teams of the multiprocessor. The number of warps moves no
// bit.
//
// The team that arrives last at a row's group adds the results of its splits, after its next item:
// it does not wait for its own arrival.
//
// Inputs, outputs and scratch as in attention_decode.cu, of R rows: q, y [R, H·D] and so on; row r
// of slot row_slots[r] is inactive if its slot or position is negative, or if the position lies
// beyond the table; it has zeros in y, q8 and meta, and no key or value. list: the work list;
// splits = G; partials, R·(H/GROUP)·stored times part_floats(D, GROUP) f32, where stored is the
// number of splits that the longest context can need; arrivals, R·(H/GROUP) u32.
// Grid (H/Hk/GROUP, Hk, the `blocks` of attention_items), best as many as fit on the device; block
// 32·n threads for 1 to TEAM_WARPS warps. Dynamic shared memory: a ring of KV blocks for each warp
// (kv_ring.cuh).
// Alignment: q, caches and partials 16 bytes. Bytes: the visible keys and values once per GROUP
// heads; the partials stay in L2.
// Twin: as attention_decode.cu.
#include "arrival.cuh"
#include "kv_ring.cuh"
#include "pdl.cuh"
#include "rope.cuh"
#include "team_parts.cuh"

// Add one KV block of the ring. `fresh`: no sums before it.
template <int D, int GROUP>
__device__ __forceinline__ void attend_staged(Heads<D, F16Kv>& heads, const unsigned short* staged,
                                              const uint4 (*queries)[4 * GROUP], int start, int oldest, int newest,
                                              bool fresh) {
    const StagedFragments<D> kv(staged);
    const int lane = threadIdx.x % 32;
    const auto query_at = [=](int s) { return lane < 4 * GROUP ? queries[s][lane] : make_uint4(0, 0, 0, 0); };
    unsigned int a[4];
    const float scale = heads.weigh(kv, query_at, start, oldest, newest, a);
    if (!fresh) {
#pragma unroll
        for (int i = 0; i < 4 * Heads<D, F16Kv>::kTiles; ++i) heads.sums[i / 4][i % 4] = __fmul_rn(heads.sums[i / 4][i % 4], scale);
    }
#pragma unroll
    for (int j = 0; j < Heads<D, F16Kv>::kTiles / 2; ++j) {
        unsigned int b[4];
        kv.load_values(b, j);
        mma_16x8x16(heads.sums[2 * j], a, b[0], b[1]);
        mma_16x8x16(heads.sums[2 * j + 1], a, b[2], b[3]);
    }
}

template <int D, int GROUP>
__device__ __forceinline__ void attend_staged(Heads<D, Q8Kv>& heads, const unsigned char* staged,
                                              const uint4 (*queries)[4 * GROUP], int start, int oldest, int newest,
                                              bool) {
    KvFragments<D, Q8Kv> kv;
    kv.load(staged, staged + Q8Kv::kHeadBlock<D>, start, oldest, newest + 1);
    const int lane = threadIdx.x % 32;
    const auto query_at = [=](int s) { return lane < 4 * GROUP ? queries[s][lane] : make_uint4(0, 0, 0, 0); };
    heads.attend_to(kv, query_at, start, oldest, newest);
}

template <int D, int GROUP, bool ADJACENT, class Kv>
__global__ void __launch_bounds__(32 * TEAM_WARPS, team_blocks_of(D))
    attention_rows(float* y, u8* q8, Meta* meta, const float* q, const float* k, const float* v,
                   typename Kv::Element* k_cache, typename Kv::Element* v_cache, const float* cos, const float* sin,
                   int dims, const int2* list, const int* tables, int table_stride, const float* sinks, float* partials,
                   unsigned int* arrivals, int n_heads, int n_kv_heads, int window, int splits, int stored,
                   const Q8Tiles tiles) {
    using Shape = RowShape<D, GROUP>;
    using Part = Parts<D, GROUP>;
    constexpr int kQuads = D / 4;  // of a head
    using Fragments = KvFragments<D, Kv>;
    __shared__ uint4 queries[Heads<D, Kv>::kSteps][4 * GROUP];
    __shared__ __align__(16) float parts[Shape::kParts][Part::kFloats];
    __shared__ float weights[GROUP][MAX_DECODE_SPLITS];
    __shared__ __align__(16) F16Kv::Row<D> new_key, new_value;  // with codes, kv_rows.cu has written them
    __shared__ int arrived_row, arrived_splits;  // of the previous item
    __shared__ bool complete;                    // this block has arrived last at its group
    const int kv_head = blockIdx.y, group = kv_head * gridDim.x + blockIdx.x, groups = gridDim.x * gridDim.y;
    const int warp = threadIdx.x / 32, head = group * GROUP;
    // Read before the wait: the list, written by an earlier kernel of this graph that lets no other
    // start before (pdl.cuh, rule 5); block tables, written before this graph (rule 1); and KV of
    // earlier tokens.
    const DecodeEntries entries(list);
    if ((int)blockIdx.z >= entries.stride) return;
    KvRing<D, GROUP, Kv> ring = {k_cache,    v_cache, tables, table_stride,
                                 n_kv_heads, kv_head, KvWalk<D, GROUP>(entries, window, splits)};
    ring.fill();

    const RopeTables rope = {cos, sin, dims};
    const auto final_rows = [=](int row) {
        const size_t first = (size_t)row * n_heads * D;
        return FinalRows{y + first, q8 + first,      meta + first / 32, sinks ? sinks + head : nullptr,
                         head * D,  n_heads * D, tiles,             row};
    };
    const auto four_of = [](F16Kv::Row<D>& row, int e) { return reinterpret_cast<uint2*>(row.elements + e); };
    const auto partials_of = [=](int row) {
        return partials + ((size_t)row * groups + group) * stored * Part::kFloats;
    };
    launch_dependents();
    grid_dependency_wait();
    Entry upcoming = entries.first;
    bool pending = false;  // the previous item has partial results of its row
    const bool arriving = threadIdx.x == blockDim.x - 32;  // its warp mostly has no query to rotate
    unsigned int arrived_before = 0;                       // of that thread
#pragma unroll 1
    for (int index = blockIdx.z;; index += entries.stride) {
        const Entry entry = upcoming;
        const bool more = index < entries.count;
        if (!more && !pending) return;
        upcoming = entries[index + entries.stride];
        if (more && !entry.active()) {
            final_rows(entry.row()).template store_zeros<D, GROUP>();
            continue;
        }
        const ItemSpan<D, GROUP> span(entry, window);
        if (more) {
            // Rotate the queries, and write the newest key and value: four elements a thread.
            const int units = (Kv::kQuantized ? GROUP : GROUP + span.has_newest(splits)) * kQuads;
#pragma unroll 1
            for (int unit = threadIdx.x; unit < units; unit += blockDim.x) {
                const int g = unit / kQuads, e = unit % kQuads * 4;
                if (g == GROUP && !k) {  // written by an earlier layer
                    const int block = tables[entry.slot() * table_stride + span.newest / kKvBlock];
                    const size_t at = Kv::template row<D>(block, n_kv_heads, kv_head, span.newest) + e;
                    *four_of(new_key, e) = __ldcg(reinterpret_cast<const uint2*>(k_cache + at));
                    *four_of(new_value, e) = __ldcg(reinterpret_cast<const uint2*>(v_cache + at));
                    continue;
                }
                const size_t kv_row = ((size_t)entry.row() * n_kv_heads + kv_head) * D;
                const float* from = g < GROUP ? q + ((size_t)entry.row() * n_heads + head + g) * D : k + kv_row;
                const float4 x = rotated<ADJACENT>(from, e, span.newest, rope);
                if (g < GROUP) {
                    const float scale = __fmul_rn(rsqrtf((float)D), kLog2e);
                    queries[Fragments::step_of(e)][4 * g + Fragments::column_of(e)] =
                        Heads<D, Kv>::query(make_float4(__fmul_rn(x.x, scale), __fmul_rn(x.y, scale),
                                                    __fmul_rn(x.z, scale), __fmul_rn(x.w, scale)));
                    continue;
                }
                const int block = tables[entry.slot() * table_stride + span.newest / kKvBlock];
                const size_t to = Kv::template row<D>(block, n_kv_heads, kv_head, span.newest) + e;
                const uint2 key = halves_of(x), value = halves_of(*reinterpret_cast<const float4*>(v + kv_row + e));
                *reinterpret_cast<uint2*>(k_cache + to) = *four_of(new_key, e) = key;
                *reinterpret_cast<uint2*>(v_cache + to) = *four_of(new_value, e) = value;
            }
        }
        __syncthreads();
        if (more) {
#pragma unroll 1
            for (int part = warp; part < span.parts; part += blockDim.x / 32) {
                Heads<D, Kv> heads;
                heads.reset();
                bool fresh = true;
#pragma unroll 1
                for (int tile = span.first + part * Shape::kOfPart; tile <= span.newest; tile += splits * Shape::kTile) {
#pragma unroll 1
                    for (int start = tile; start < tile + Shape::kOfPart; start += kKvBlock) {
                        if (!span.sees(start)) continue;
                        ring.find();
                        wait_for_copies<RING_SLOTS - 1>();
                        if constexpr (!Kv::kQuantized) {
                            if (span.newest - start < kKvBlock) {
                                __syncwarp();
                                StagedKv<D, Kv>::insert(ring.first(), new_key.elements, new_value.elements,
                                                    span.newest - start);
                            }
                        }
                        __syncwarp();
                        attend_staged<D, GROUP>(heads, ring.first(), queries, start, span.oldest, span.newest, fresh);
                        fresh = false;
                        __syncwarp();
                        ring.push();
                    }
                }
                if constexpr (Kv::kQuantized) heads.template store_partial<Part::kRow>(parts[part], GROUP);
                else Part::store(heads, parts[part]);
            }
        }
        // The result of the atomic is needed only here: the thread does not wait for it before.
        if (pending && arriving) complete = (int)arrived_before == arrived_splits - 1;
        __syncthreads();
        // First the splits of the previous item's row, if this block has arrived last, then this
        // item.
        const int active = span.active(splits);
        bool arrives = false;
#pragma unroll 1
        for (int own = pending && complete ? 0 : 1; own < 1 + more; ++own) {
            const float* const results = own ? parts[0] : partials_of(arrived_row);
            arrives = own && active > 1;
            Part::combine(results, own ? span.parts : arrived_splits, weights,
                          final_rows(own ? entry.row() : arrived_row),
                          arrives ? partials_of(entry.row()) + entry.mine() * Part::kFloats : nullptr);
            if (!own || arrives) __syncthreads();
        }
        if (!more) return;
        if (arrives && arriving) {
            arrived_row = entry.row(), arrived_splits = active;
            arrived_before = arrive(arrivals + (size_t)entry.row() * groups + group, active - 1);
        }
        pending = arrives;
    }
}
