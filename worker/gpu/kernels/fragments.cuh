// Column order of a prefill product's input: an MMA fragment of a lane pairs with one unit of
// weights.
//
// A row of f16 is a sequence of groups of 128 columns, each four units of 32. In an MMA of 16
// columns (mma.cuh), lane c of a quad holds columns 2c, 2c+1, 2c+8 and 2c+9. With this order those
// columns are elements 4s to 4s+3 of unit c of the group, in the group's MMA s. A lane therefore
// converts whole units of weights to the fragments of A in registers, and `load_matrices` brings
// the fragments of B as they are stored. The last group is padded with zeros.
// Twin: `fragment_order` in tests/gpu/activations.py.
#pragma once

constexpr int kColumnGroup = 128;

// Columns of a row in memory.
__host__ __device__ constexpr unsigned int padded(unsigned int cols) {
    return (cols + kColumnGroup - 1) / kColumnGroup * kColumnGroup;
}

// Index in the stored row of a column.
__device__ __forceinline__ unsigned int fragment_index(unsigned int column) {
    const unsigned int unit = column % kColumnGroup / 32, element = column % 32;
    return column / kColumnGroup * kColumnGroup + element / 4 * 16 + element / 2 % 2 * 8 + unit * 2 + element % 2;
}

// The column that is stored at an index.
__device__ __forceinline__ unsigned int fragment_column(unsigned int index) {
    const unsigned int in_group = index % kColumnGroup;
    return index / kColumnGroup * kColumnGroup + in_group / 2 % 4 * 32 + in_group / 16 * 4 + in_group / 8 % 2 * 2 + in_group % 2;
}
