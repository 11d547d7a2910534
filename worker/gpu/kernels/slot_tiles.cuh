// Tiles of rows for the experts' products of prefill, written by group_routes.cu and read by
// matmul.cu and matmul_wgmma.cu.
//
// Slot t·k + j is token t's j-th expert. Row i of an expert's product is slot order[i]: rows are
// sorted by expert. A tile is up to TILE_N adjacent rows of one expert.
// Python: `ExpertGroups` and `_SLOT_TILES` in worker/gpu/matmul_params.py.
#pragma once

struct SlotTile {
    int expert, first, count;  // rows first to first + count - 1
};

struct SlotTiles {
    const int* order;       // [T·k] slots sorted by expert, where y is in order of slots; null: y[i] is row i
    const SlotTile* table;  // [tiles]; unused ones have count 0; null for a dense matrix
    int parts;              // blocks of grid y for each tile, of which each takes TILE_N rows
};

// The rows of block y of a grid.
template <int TILE_N>
__device__ __forceinline__ SlotTile tile_of(const SlotTiles& tiles, int y) {
    const SlotTile tile = tiles.table[y / tiles.parts];
    const int skipped = y % tiles.parts * TILE_N;
    return {tile.expert, tile.first + skipped, min(TILE_N, tile.count - skipped)};
}
