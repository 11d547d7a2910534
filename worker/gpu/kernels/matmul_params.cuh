// Parameters of a launch of matmul.cu, and the tokens of one of its blocks.
// Python: `_PROJECTION`, `_PARAMS` in worker/gpu/matmul_params.py.
#pragma once
#include "formats.cuh"
#include "gated.cuh"
#include "slot_tiles.cuh"

struct Projection {
    Planes planes;
    const float* bias;  // [rows] or null
    float* out;         // [T, rows]; with GLU h: f16 [T, padded rows]
    int rows;
    u32 first_block;  // of grid x
};

struct MatmulParams {
    Projection projections[3];  // up to three of one x, absent ones begin past the grid; with GLU gate (with out) and up
    const float* residual;      // [T, rows] of the only projection, or null
    const float* scale;         // [*] or null
    const float* h_scale;       // [T], with GLU only: h is divided by it
    const int* count;           // [1] or null
    int cols;
    Gate gate;
};

// The tokens (or slots) of a block, in shared memory.
template <int TILE_N>
struct TokenTile {
    SlotTile tile;
    int slots[TILE_N];
    u32 x_rows[TILE_N];  // index in x of the first element of each token's row
    float scales[TILE_N];
    float h_inverses[TILE_N];  // 1 / h_scale, with GLU
};
