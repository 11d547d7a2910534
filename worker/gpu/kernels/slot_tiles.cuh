// Tiles of slots for the experts' products of prefill, written by group_routes.cu and read by
// matmul.cu.
//
// Slot t·k + j is token t's j-th expert. A tile is up to TILE_N slots of one expert, adjacent in
// `order`.
// Python: `ExpertGroups` and `_SLOT_TILES` in worker/gpu/matmul.py.
#pragma once

struct SlotTile {
    int expert, first, count;  // slots order[first] to order[first + count - 1]
};

struct SlotTiles {
    const int* order;       // [T·k] slots sorted by expert, ascending within each
    const SlotTile* table;  // [tiles]; unused ones have count 0
    int slots_per_row;      // slots that share a row of the input: k for tokens' rows, 1 for slots' own rows
};
