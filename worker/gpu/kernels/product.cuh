// What a launch of matmul.cu is told, and what one of its blocks works on. Twins: `_PART`, `_PRODUCT` in worker/gpu/matmul.py.
#pragma once
#include "formats.cuh"
#include "gated.cuh"
#include "tiles.cuh"

struct Part {
    Planes planes;
    const float* bias;  // [rows] or null
    float* out;         // [T, rows]
    int rows;
    u32 first;  // block of grid x
};

struct Product {
    Part parts[3];          // up to three projections of one x, absent ones past the grid; with GLU gate (and out), up
    const float* residual;  // [T, rows] of the only part, or null
    const float* scale;     // [*] or null
    const int* count;       // or null
    int cols;
    Gate gate;
};

template <int TOKENS>
struct Scope {
    Tile tile;
    int slots[TOKENS];
    u32 x_rows[TOKENS];  // where each token's row of x begins
    float scales[TOKENS];
};
