// How decode attention divides a sequence's positions: tiles, dealt to splits, and the warps of a
// tile.
//
// The positions are cut into tiles of 128 or 256 at absolute multiples of the tile. Split g of G
// computes the tiles s ≡ g (mod G) by online softmax. A tile is divided evenly among `warps_of`
// warps, each of which has one or two KV blocks of every tile of its split. G and the tile are
// constants of the model's shape, so the order of the sums depends on the position alone.
// Users: attention_decode.cu, attention_few_rows.cu, attention_rows.cu, attention_items.cu.
#pragma once
#include "kv_cache.cuh"

// Warps of a block, KV blocks of a tile for each warp, and blocks of a multiprocessor. Two blocks
// of a multiprocessor let one start beside the preceding product's blocks and load its keys and
// values while those still run. Groups of more than 4 heads use 16 warps: they add more per
// position in a long context.
__host__ __device__ constexpr bool is_wide(int head_dim, int group) {
    return head_dim == DECODE_WIDE_DIM && group >= DECODE_WIDE_GROUP;
}
__host__ __device__ constexpr int warps_of(int head_dim, int group) {
    return is_wide(head_dim, group) ? DECODE_WIDE_WARPS : DECODE_WARPS;
}
__host__ __device__ constexpr int kv_blocks_of(int head_dim, int group) {
    return head_dim == DECODE_WIDE_DIM && !is_wide(head_dim, group) ? 2 : 1;
}
__host__ __device__ constexpr int blocks_of(int head_dim, int group) {
    return head_dim >= 128 || is_wide(head_dim, group) ? 1 : 2;
}

// Blocks of attention_rows with TEAM_WARPS warps that registers allow on a multiprocessor.
__host__ __device__ constexpr int team_blocks_of(int head_dim) { return head_dim >= 128 ? 1 : 2; }

// The tiles of one split: of `tiles` from the tile `first` on, those that lie `mine` after it,
// `splits` apart (splits = G).
struct SplitTiles {
    int newest, oldest, first, tiles, splits, mine;

    // `mine` from 0 to active() - 1 enumerates the splits that have tiles. A negative position has
    // no tiles.
    __device__ __forceinline__ SplitTiles(int position, int window, int tile, int splits, int mine)
        : newest(position), oldest(window && position >= window ? position - window + 1 : 0), first(oldest / tile),
          tiles((newest + tile) / tile - first), splits(splits), mine(mine) {}

    // The same for split g.
    __device__ __forceinline__ static SplitTiles of_split(int position, int window, int tile, int splits, int g) {
        SplitTiles tiles(position, window, tile, splits, 0);
        const int offset = g - (tiles.first < splits ? tiles.first : tiles.first % splits);
        tiles.mine = offset < 0 ? offset + splits : offset;
        return tiles;
    }
    __device__ __forceinline__ int active() const { return min(tiles, splits); }
    __device__ __forceinline__ bool has_newest() const {
        return tiles <= splits ? mine == tiles - 1 : (tiles - 1 - mine) % splits == 0;
    }
    __device__ __forceinline__ bool sees(int start) const { return start <= newest && start + kKvBlock > oldest; }
};

// One split of a row in a work list (attention_items.cu): the row, its slot and position, and
// SplitTiles::mine. An inactive row has one entry without a position.
struct Entry {
    int of_row, of_split;

    __device__ __forceinline__ static Entry of(int row, int slot, int position, int mine) {
        return {(int)((unsigned int)row << 16 | (slot & 0xffff)), position < 0 ? -1 : position << 6 | mine};
    }
    __device__ __forceinline__ bool active() const { return of_split >= 0; }
    __device__ __forceinline__ int row() const { return (unsigned int)of_row >> 16; }
    __device__ __forceinline__ int slot() const { return of_row & 0xffff; }
    __device__ __forceinline__ int position() const { return of_split >> 6; }  // -1: inactive
    __device__ __forceinline__ int mine() const { return of_split & 63; }
};
static_assert(MAX_DECODE_SPLITS <= 64, "six bits");
