// Where a column of a prefill product's input lies: the tensor cores' order, in which a lane's weights are neighbours.
//
// A row of f16 is groups of 128 columns, four units of 32. Of a product of 16 columns (mma.cuh) lane c of a quad holds
// columns 2c, 2c+1, 2c+8 and 2c+9; here it gets elements 4s to 4s+3 of unit c of the group in product s. So a lane takes
// whole units of weights in registers as A, and x is B as `load_matrices` brings it. The last group is padded by zeros.
// Twin: `in_fragments` in tests/gpu/activations.py.
#pragma once

constexpr int kGroup = 128;

__host__ __device__ constexpr unsigned int padded(unsigned int cols) { return (cols + kGroup - 1) / kGroup * kGroup; }

__device__ __forceinline__ unsigned int place_of(unsigned int column) {
    const unsigned int unit = column % kGroup / 32, element = column % 32;
    return column / kGroup * kGroup + element / 4 * 16 + element / 2 % 2 * 8 + unit * 2 + element % 2;
}
