// A matrix of a decode product with its epilogue, for matvec.cu and matvec_rows.cu. Python:
// `_MATRIX` in worker/gpu/matvec.py.
#pragma once
#include "codes.cuh"

struct Matrix {
    Planes planes;
    const float* bias;      // [rows] or null
    const float* residual;  // [R, rows] or null
    float* out;             // [R, rows]
    int rows, first_block, blocks;
};
