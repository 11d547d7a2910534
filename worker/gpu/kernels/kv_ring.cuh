// A warp's ring of KV blocks in shared memory, filled by asynchronous copies across work items.
//
// A work item is one split (decode_splits.cuh) of one row for one group of heads. A thread block is
// a team of any number of warps that divides the item's parts, those that `warps_of` warps compute
// in attention_decode.cu: warp w of n has the parts w, w + n, …. Block (x, y, z) of a
// grid computes one group of heads of the entries z, z + stride, …; blocks from `stride` on have
// none.
// Each warp copies ahead the KV blocks that it will read, RING_SLOTS of them, in the order in which
// it reads them and past the end of an item: copies stay in flight while the team combines results.
// A warp reads only its own copies, so the ring needs no barrier of the team.
// Users: attention_rows.cu; entries and spans: attention_few_rows.cu.
#pragma once
#include "decode_heads.cuh"
#include "decode_splits.cuh"

template <int D, int GROUP>
struct RowShape {
    static constexpr int kParts = warps_of(D, GROUP), kBlocks = kv_blocks_of(D, GROUP);
    static constexpr int kOfPart = kBlocks * kKvBlock, kTile = kParts * kOfPart;
};

// The entries of a step (attention_items.cu). They are read through L2, because an earlier kernel
// of this graph has written them (pdl.cuh, rule 5).
struct DecodeEntries {
    const int2* entries;
    Entry first;  // of this block, loaded together with the count
    int count, stride;

    __device__ __forceinline__ explicit DecodeEntries(const int2* list) : entries(list + 1), first(load(blockIdx.z)) {
        const int2 sizes = __ldcg(list);
        count = sizes.x, stride = sizes.y;
    }
    // Entry i; an inactive one beyond the last.
    __device__ __forceinline__ Entry operator[](int i) const { return i < count ? load(i) : Entry{0, -1}; }

private:
    __device__ __forceinline__ Entry load(int i) const {
        const int2 words = __ldcg(entries + i);
        return {words.x, words.y};
    }
};

// The positions of an item: of the tiles that start at `first` and every `stride` positions after
// it, those from `oldest` to `newest`. Part p has kOfPart positions of each tile, from p·kOfPart
// on.
template <int D, int GROUP>
struct ItemSpan {
    using Shape = RowShape<D, GROUP>;
    int newest, oldest, first, parts;  // parts that have positions

    __device__ __forceinline__ ItemSpan(const Entry entry, int window) : newest(entry.position()) {
        oldest = window && newest >= window ? newest - window + 1 : 0;
        first = (oldest / Shape::kTile + entry.mine()) * Shape::kTile;
        parts = min(Shape::kParts, (newest - first) / Shape::kOfPart + 1);
    }
    __device__ __forceinline__ bool has_newest(int splits) const {
        const int tiles = (newest - first) / Shape::kTile;  // after the first one
        return tiles == 0 || (tiles >= splits && tiles % splits == 0);
    }
    // The number of splits of the row, and of their partial results.
    __device__ __forceinline__ int active(int splits) const {
        return min(splits, newest / Shape::kTile - oldest / Shape::kTile + 1);
    }
    __device__ __forceinline__ bool sees(int start) const { return start <= newest && start + kKvBlock > oldest; }
};

// One KV block of one head in shared memory. Keys in f16: the 16-byte chunks that a lane needs for
// scores (decode_heads.cuh), [2][D / 32][32 lanes]; each lane copies its own. Values [16][D]: the
// chunks of a row are permuted so that `ldmatrix` reads a column of eight chunks from all banks.
template <int D, class Kv>
struct StagedKv;

template <int D>
struct StagedKv<D, F16Kv> {
    static constexpr int kSections = D / 32, kChunks = D / 8, kValues = kKvBlock * D, kElements = 2 * kValues;

    __device__ __forceinline__ static int key_at(int t, int section) {
        return 8 * (32 * (t * kSections + section) + threadIdx.x % 32);
    }
    __device__ __forceinline__ static int value_at(int row, int chunk) {
        const int mask = D % 64 ? row / 2 % 4 : row % 2 * 4 + row / 2 % 4;
        return kValues + row * D + 8 * (chunk ^ mask);
    }

    // Copy the rows at positions [oldest, newest) and zero the others: an unwritten slot may hold
    // NaN, and 0·NaN is NaN.
    __device__ __forceinline__ static void copy(unsigned int to, const unsigned short* keys,
                                                const unsigned short* values, int start, int oldest, int newest) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            const int row = 8 * t + lane / 4, p = start + row;
            const bool valid = p >= oldest && p < newest;
#pragma unroll
            for (int i = 0; i < kSections; ++i) {
                const int chunk = 4 * i + lane % 4, from = row * D + 8 * chunk;
                copy_16_async(to + 2 * key_at(t, i), keys + from, valid);
                copy_16_async(to + 2 * value_at(row, chunk), values + from, valid);
            }
        }
    }

    // Insert the newest position's key and value, which this launch computes.
    __device__ __forceinline__ static void insert(unsigned short* to, const unsigned short* key,
                                                  const unsigned short* value, int row) {
        const int lane = threadIdx.x % 32;
        if (lane / 4 == row % 8) {
#pragma unroll
            for (int i = 0; i < kSections; ++i)
                *reinterpret_cast<uint4*>(to + key_at(row / 8, i)) =
                    *reinterpret_cast<const uint4*>(key + 32 * i + 8 * (lane % 4));
        }
        if (lane < kChunks)
            *reinterpret_cast<uint4*>(to + value_at(row, lane)) = *reinterpret_cast<const uint4*>(value + 8 * lane);
    }
};

// With codes: the two head blocks as they are. Also the newest key and value are in the cache,
// since kv_rows.cu has written them.
template <int D>
struct StagedKv<D, Q8Kv> {
    static constexpr int kValues = Q8Kv::kHeadBlock<D>, kElements = 2 * kValues;

    __device__ __forceinline__ static void copy(unsigned int to, const unsigned char* keys, const unsigned char* values,
                                                int, int, int) {
#pragma unroll
        for (int i = 0; i < (kValues + 511) / 512; ++i) {
            const int at = 512 * i + 16 * (threadIdx.x % 32);
            if (at >= kValues) continue;
            copy_16_async(to + at, keys + at, true);
            copy_16_async(to + kValues + at, values + at, true);
        }
    }
};

// Staged f16 in registers: keys, and the values of two tiles at a time.
template <int D>
struct StagedFragments {
    using Staged = StagedKv<D, F16Kv>;
    uint4 keys[2][Staged::kSections];
    const unsigned short* staged;

    __device__ __forceinline__ explicit StagedFragments(const unsigned short* staged) : staged(staged) {
#pragma unroll
        for (int t = 0; t < 2; ++t) {
#pragma unroll
            for (int i = 0; i < Staged::kSections; ++i)
                keys[t][i] = *reinterpret_cast<const uint4*>(staged + Staged::key_at(t, i));
        }
    }
    __device__ __forceinline__ uint2 key(int t, int s) const {
        const uint4 k = keys[t][s / 2];
        return s % 2 ? make_uint2(k.z, k.w) : make_uint2(k.x, k.y);
    }
    __device__ __forceinline__ static float score(int, int, float sum) { return sum; }
    __device__ __forceinline__ static float factor(int, int, float weight) { return weight; }
    // Elements 16j … 16j + 15 as fragments of B: {first eight | last eight} of two words.
    __device__ __forceinline__ void load_values(unsigned int (&b)[4], int j) const {
        const int matrix = threadIdx.x % 32 / 8, row = matrix % 2 * 8 + threadIdx.x % 8;
        load_matrices_transposed(b, staged + Staged::value_at(row, 2 * j + matrix / 2));
    }
};

// Walks over the KV blocks that this warp reads, item after item, in the order of computation.
template <int D, int GROUP>
struct KvWalk {
    using Shape = RowShape<D, GROUP>;
    const DecodeEntries entries;
    const int window, stride;
    ItemSpan<D, GROUP> span;
    Entry upcoming;
    int index, table, part, tile, i;  // tile: its first position; table: of the row, an offset

    __device__ __forceinline__ KvWalk(const DecodeEntries& entries, int window, int splits)
        : entries(entries), window(window), stride(splits * Shape::kTile), span(Entry{0, 0}, 0),
          upcoming(entries.first), index(blockIdx.z), table(0), part(Shape::kParts), tile(0), i(Shape::kBlocks - 1) {}

    __device__ __forceinline__ int start() const { return tile + part * Shape::kOfPart + i * kKvBlock; }

    // Go to the next visible KV block. Returns false after the last one.
    __device__ __forceinline__ bool next(int table_stride) {
        do {
            if (++i < Shape::kBlocks) continue;
            i = 0, tile += stride;
            if (tile <= span.newest && part < Shape::kParts) continue;
            tile = span.first, part += blockDim.x / 32;
            if (part >= span.parts && !open(table_stride)) return false;
        } while (!span.sees(start()));
        return true;
    }

private:
    // Go to the next entry of which this warp has a part.
    __device__ __forceinline__ bool open(int table_stride) {
        while (index < entries.count) {
            const Entry entry = upcoming;
            index += entries.stride;
            upcoming = entries[index];
            if (!entry.active()) continue;
            span = ItemSpan<D, GROUP>(entry, window);
            table = entry.slot() * table_stride, part = threadIdx.x / 32, tile = span.first, i = 0;
            if (part < span.parts) return true;
        }
        part = Shape::kParts, i = Shape::kBlocks - 1;
        return false;
    }
};

template <int D, int GROUP, class Kv>
struct KvRing {
    using Staged = StagedKv<D, Kv>;
    const typename Kv::Element *k_cache, *v_cache;
    const int* tables;
    int table_stride, n_kv_heads, kv_head;
    KvWalk<D, GROUP> walk;
    int front = 0, block = -1;

    // Look up the KV block to copy next, before the slot that it goes to is free.
    __device__ __forceinline__ void find() {
        block = walk.next(table_stride) ? tables[walk.table + walk.start() / kKvBlock] : -1;
    }
    // Copy it to the slot at the front, which becomes the last one.
    __device__ __forceinline__ void push() {
        if (block >= 0) {
            const size_t at = Kv::template row<D>(block, n_kv_heads, kv_head, 0);
            const unsigned int to = (unsigned int)__cvta_generic_to_shared(first());
            Staged::copy(to, k_cache + at, v_cache + at, walk.start(), walk.span.oldest, walk.span.newest);
        }
        commit_copies();
        front = front + 1 < RING_SLOTS ? front + 1 : 0;
    }
    __device__ __forceinline__ void fill() {
#pragma unroll 1
        for (int slot = 0; slot < RING_SLOTS; ++slot) find(), push();
    }
    // The KV block at the front.
    __device__ __forceinline__ typename Kv::Element* first() const {
        extern __shared__ __align__(16) unsigned short kv_ring_slots[];  // [warps][RING_SLOTS] StagedKv
        return reinterpret_cast<typename Kv::Element*>(kv_ring_slots) +
               (threadIdx.x / 32 * RING_SLOTS + front) * Staged::kElements;
    }
};
