// Activations of decode in 8 bits for the tensor cores: the values of q8_activations.cuh, arranged
// so that a lane of a warp loads its fragments of B from global memory in 16 bytes.
//
// Rows are in tiles of 16; rows that are only padding are zeros. For unit u (32 columns) of a tile
// - q, i8: [unit][tile][lane][16 bytes]; lane 4·g + c has elements 4c to 4c+3 and 16+4c to 19+4c of
//   row 2g of the tile, then those of row 2g + 1: b0 and b1 of the MMAs for the even and the odd
//   rows (mma_s8.cuh);
// - meta, f32: [unit][tile][3][16], the scales of the rows, the sums of q, and the sums of q over
//   elements 0 to 15.
// Writers: quantize_rows.cu, attention_few_rows.cu, attention_rows.cu, matvec_mma_wide.cu. Readers:
// matvec_mma.cu, matvec_mma_wide.cu. Python: `Q8Tiles` in worker/gpu/activations.py.
#pragma once
#include "q8_activations.cuh"

constexpr int kTileRows = 16, kTileMeta = 3 * kTileRows;  // floats of a unit of a tile

struct Q8Tiles {
    u8* q;
    float* meta;
    int tiles, units;
    // Byte of elements 4·c to 4·c+3 of a row's unit; elements 16 further are 4 bytes further.
    __device__ __forceinline__ size_t q_offset(int row, int unit, int c) const {
        const size_t tile = (size_t)unit * tiles + row / kTileRows;
        return tile * 512 + row % kTileRows / 2 * 64 + c * 16 + row % 2 * 8;
    }
    __device__ __forceinline__ void store_meta(int row, int unit, float scale, int low, int high) const {
        float* const to = meta + ((size_t)unit * tiles + row / kTileRows) * kTileMeta + row % kTileRows;
        to[0] = scale, to[kTileRows] = (float)(low + high), to[2 * kTileRows] = (float)low;
    }
    // Four elements of a row, from `column` on.
    __device__ __forceinline__ void store_quad(u32 packed, int row, int column) const {
        const int word = column % 32 / 4;
        *reinterpret_cast<u32*>(q + q_offset(row, column / 32, word % 4) + word / 4 * 4) = packed;
    }
    // Eight elements a lane, from `column` on, a unit in four adjacent lanes. Called by all lanes
    // of a warp; lanes that are not `valid` store nothing.
    __device__ __forceinline__ void store_eight(const Q8Quads<2>& v, int row, int column, bool valid) const {
        const bool upper = column % 32 >= 16;  // of the unit: its first four are stored with the lower half's
        const u32 other = __shfl_xor_sync(0xffffffffu, upper ? v.packed[0] : v.packed[1], 2);
        if (!valid) return;
        const uint2 both = upper ? make_uint2(other, v.packed[1]) : make_uint2(v.packed[0], other);
        *reinterpret_cast<uint2*>(q + q_offset(row, column / 32, column % 16 / 4 + upper)) = both;
        if (column % 32 == 0) store_meta(row, column / 32, v.scale, v.low, v.high);
    }
    // One element a lane: the warp holds a unit of a row.
    __device__ __forceinline__ void store_lane(float x, int row, int unit) const {
        const int lane = threadIdx.x % 32;
        const Q8Lane v(x);
        q[q_offset(row, unit, lane / 4 % 4) + lane / 16 * 4 + lane % 4] = (u8)v.code;
        if (lane == 0) store_meta(row, unit, v.scale, v.low, v.high);
    }
};
