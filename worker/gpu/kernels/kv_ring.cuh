// A warp's ring of KV blocks in shared memory, filled by asynchronous copies across work items.
//
// A work item is one split (decode_splits.cuh) of GROUP heads of one row; block b of a grid of n
// blocks has the items b, b + n, …. Each warp copies ahead the KV blocks that it will read,
// RING_SLOTS of them, in the order in which it reads them and past the end of an item: copies stay
// in flight while the block combines results. A warp reads only its own copies, so the ring needs
// no barrier of the block. Users: attention_rows.cu.
#pragma once
#include "decode_heads.cuh"
#include "decode_splits.cuh"

// A block has ROWS_THREADS threads; if a tile has more warps than that, a warp computes several.
template <int D, int GROUP>
struct RowShape {
    static constexpr int kWarps = ROWS_THREADS / 32, kTileWarps = warps_of(D, GROUP), kParts = kTileWarps / kWarps;
    static constexpr int kBlocks = kv_blocks_of(D, GROUP), kOfWarp = kBlocks * kKvBlock, kTile = kTileWarps * kOfWarp;
    static_assert(kTileWarps % kWarps == 0, "each warp computes the same number of a tile's warps");
};

// Blocks of a multiprocessor: as many as registers and rings allow.
__host__ __device__ constexpr int rows_blocks_of(int head_dim, int group) {
    return head_dim == 64 || (head_dim == 96 && group == 1) ? 2 : 1;
}

// The entries of a step (attention_items.cu); an item is one group of heads of an entry. They are
// read through L2, because an earlier kernel of this graph has written them (pdl.cuh, rule 5).
struct DecodeItems {
    const int2* entries;
    int groups, count;
    Entry first;  // of this block's first item, loaded together with the count

    __device__ __forceinline__ DecodeItems(const int2* list, int groups)
        : entries(list + 1), groups(groups), first(load(blockIdx.x)) {
        count = groups * __ldcg(list).x;
    }
    // Entry of item i; that of no item is inactive.
    __device__ __forceinline__ Entry entry(int i) const { return i < count ? load(i) : Entry{0, -1}; }

private:
    __device__ __forceinline__ Entry load(int i) const {
        const int2 words = __ldcg(entries + i / groups);
        return {words.x, words.y};
    }
};

// One KV block of one head in shared memory: keys [16][D], then values [16][D]. The 16-byte chunks
// of a row are permuted so that the lanes' reads (decode_heads.cuh) spread over the banks.
template <int D>
struct StagedKv {
    static constexpr int kChunks = D / 8, kValues = kKvBlock * D, kHalves = 2 * kValues;

    __device__ __forceinline__ static int at(int row, int chunk) {
        const int mask = D % 64 ? row / 2 % 4 : (row / 2 % 4 * 2) ^ (row % 2 * 4);
        return row * D + 8 * (chunk ^ mask);
    }

    // Copy the rows at positions [oldest, newest) and zero the others, as KvFragments::load does.
    __device__ __forceinline__ static void copy(unsigned int to, const unsigned short* keys,
                                                const unsigned short* values, int start, int oldest, int newest) {
#pragma unroll 1  // unrolled code would keep all addresses in registers
        for (int i = threadIdx.x % 32; i < kKvBlock * kChunks; i += 32) {
            const int row = i / kChunks, p = start + row;
            const bool valid = p >= oldest && p < newest;
            const unsigned int chunk = to + 2 * at(row, i % kChunks);
            copy_16_async(chunk, keys + 8 * i, valid);
            copy_16_async(chunk + 2 * kValues, values + 8 * i, valid);
        }
    }

    // Insert the newest position's key and value, which this launch computes.
    __device__ __forceinline__ static void insert(unsigned short* to, const unsigned short* key,
                                                  const unsigned short* value, int row) {
        const int lane = threadIdx.x % 32, chunk = lane % 16;
        if (chunk >= kChunks) return;
        const uint4 v = *reinterpret_cast<const uint4*>((lane < 16 ? key : value) + 8 * chunk);
        *reinterpret_cast<uint4*>(to + (lane < 16 ? 0 : kValues) + at(row, chunk)) = v;
    }
};

// The same in registers: keys from the beginning on, values when `attend` needs them.
template <int D>
struct StagedFragments : KvFragments<D> {
    using Kv = KvFragments<D>;
    const unsigned short* staged;

    __device__ __forceinline__ explicit StagedFragments(const unsigned short* staged) : staged(staged) {
#pragma unroll
        for (int t = 0; t < 2; ++t) {
#pragma unroll
            for (int i = 0; i < Kv::kSections; ++i)
                Kv::keys[t][i] = *reinterpret_cast<const uint4*>(
                    staged + StagedKv<D>::at(Kv::key_row(t), 4 * i + (int)threadIdx.x % 4));
        }
    }
    __device__ __forceinline__ void load_values() {
        const unsigned short* const from = staged + StagedKv<D>::kValues;
        const int g = threadIdx.x % 32 / 4;
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            const int row = Kv::value_row(t);
#pragma unroll
            for (int i = 0; i < Kv::kWide; ++i)
                Kv::values[t][i] = *reinterpret_cast<const uint4*>(from + StagedKv<D>::at(row, 8 * i + g));
            if (Kv::kNarrow)
                Kv::narrow[t] = *reinterpret_cast<const uint2*>(
                    from + StagedKv<D>::at(row, 8 * Kv::kWide + g / 2) + g % 2 * 4);
        }
    }
};

// Walks over the KV blocks that this warp reads, item after item, in the order of computation.
template <int D, int GROUP>
struct KvCursor {
    using Shape = RowShape<D, GROUP>;
    const DecodeItems items;
    const int window;
    SplitTiles tiles;
    Entry upcoming;
    int index, slot, part = Shape::kParts, tile = 0, i = 0;

    __device__ __forceinline__ KvCursor(const DecodeItems items, int window, int splits)
        : items(items), window(window), tiles(0, 0, Shape::kTile, splits, 0), upcoming(items.first),
          index((int)blockIdx.x - (int)gridDim.x), slot(0) {}

    // The first position of KV block i of this warp's part of a tile.
    __device__ __forceinline__ static int start_of(const SplitTiles& tiles, int part, int tile, int i) {
        const int warp = threadIdx.x / 32 + part * Shape::kWarps;
        return (tiles.first + tile) * Shape::kTile + warp * Shape::kOfWarp + i * kKvBlock;
    }
    __device__ __forceinline__ int start() const { return start_of(tiles, part, tile, i); }

    // Go to the next visible KV block. Returns false after the last one.
    __device__ __forceinline__ bool next() {
        do {
            if (!step() && !open()) return false;
        } while (!tiles.sees(start()));
        return true;
    }

private:
    __device__ __forceinline__ bool step() {
        if (part >= Shape::kParts) return false;
        if (++i < Shape::kBlocks) return true;
        i = 0, tile += tiles.splits;
        if (tile < tiles.tiles) return true;
        tile = tiles.mine;
        return ++part < Shape::kParts;
    }
    __device__ __forceinline__ bool open() {
        while (index < items.count) {
            index += gridDim.x;
            const Entry entry = upcoming;
            upcoming = items.entry(index + gridDim.x);
            if (!entry.active()) continue;
            tiles = SplitTiles(entry.position(), window, Shape::kTile, tiles.splits, entry.mine());
            slot = entry.slot(), part = 0, tile = tiles.mine, i = 0;
            return true;
        }
        return false;
    }
};

template <int D, int GROUP>
struct KvRing {
    const unsigned short *k_cache, *v_cache;
    const int* tables;
    int table_stride, n_kv_heads, groups_per_kv_head;
    KvCursor<D, GROUP> cursor;
    int front = 0, block = -1;

    // Look up the KV block to copy next, before the slot that it goes to is free.
    __device__ __forceinline__ void find() {
        block = cursor.next() ? tables[(size_t)cursor.slot * table_stride + cursor.start() / kKvBlock] : -1;
    }
    // Copy it to the slot at the front, which becomes the last one.
    __device__ __forceinline__ void push() {
        if (block >= 0) {
            const int kv_head = cursor.index % cursor.items.groups / groups_per_kv_head;
            const size_t at = kv_offset<D>(block, n_kv_heads, kv_head, 0);
            const unsigned int to = (unsigned int)__cvta_generic_to_shared(first());
            const SplitTiles& tiles = cursor.tiles;
            StagedKv<D>::copy(to, k_cache + at, v_cache + at, cursor.start(), tiles.oldest, tiles.newest);
        }
        commit_copies();
        front = front + 1 < RING_SLOTS ? front + 1 : 0;
    }
    // Fill the slots; both are looked up before either lookup is used.
    __device__ __forceinline__ void fill() {
        static_assert(RING_SLOTS == 2, "two slots");
        find();
        KvRing earlier = *this;
        find();
        earlier.push();
        front = 1;
        push();
    }
    // The KV block at the front.
    __device__ __forceinline__ unsigned short* first() const {
        extern __shared__ __align__(16) unsigned short kv_ring_slots[];  // [warps][RING_SLOTS] StagedKv
        return kv_ring_slots + (threadIdx.x / 32 * RING_SLOTS + front) * StagedKv<D>::kHalves;
    }
};
