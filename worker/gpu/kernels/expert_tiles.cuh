// Tiles of pairs for the experts' products of decode, written by group_pairs.cu and read by
// grouped_experts.cu.
//
// Pair r·k + j is row r's j-th expert. A tile is up to kTilePairs pairs of one expert, adjacent in
// `order`. Each block of grouped_experts.cu computes a range of the chunks (32 rows of the weights)
// of all tiles; ranges of equal cost are computed in about equal time.
// Python: `ExpertTiles` in worker/gpu/decode_experts.py.
#pragma once

constexpr int kTilePairs = TILE_PAIRS;
constexpr int kChunkCost = 8;  // of a chunk's weights, in units of the arithmetic of one pair

struct __align__(16) ExpertTile {
    int expert, first, count;  // pairs order[first] to order[first + count - 1]
    int start;                 // sum of the costs of a chunk of each earlier tile
    __device__ __forceinline__ int cost() const { return kChunkCost + count; }
};

struct ExpertTiles {
    const int* order;         // [R·k] active pairs sorted by expert, ascending within each
    const ExpertTile* table;  // [tiles + 1]; unused ones have count 0 and the start of the end
    int tiles;
};
