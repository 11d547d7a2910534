// Which slots (token t's j-th expert is slot t·k + j) a tile of an expert product takes; written by group_routes.cu.
#pragma once

struct Tile {
    int expert, first, count;  // slots order[first] to order[first + count - 1]
};

struct Tiles {
    const int* order;   // [T·k] slots by expert, rising within each
    const Tile* table;  // [tiles]; unused ones have count 0
    int per_slot;       // slots that share a row of the input: k for a token's, 1 for a slot's own
};
