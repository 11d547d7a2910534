// Activations of decode in 8 bits: blocks of 32 elements with one scale, x ≈ scale·q, as in ggml's
// Q8_1.
//
// A row of `cols` (a multiple of 32) is
// - `q`, i8: elements 0–15 of all blocks, then elements 16–31 of all blocks;
// - `meta`, 8 bytes a block: the scale amax/127 and the sums of q over either half, which account
// for the zero points and
//   minima of the weights.
// q = x·(127/amax), rounded to nearest even; a block with amax < 1e-30 is zeros. Row strides are
// cols bytes and cols/32·8 bytes. A step is 1/127 of the block's largest element: a relative error
// of a product of about 0.5 % of the norm for normally distributed x, at most 1.3 % with one
// outlier in each block. Twin: `quantize` in tests/quantized_ops.py.
// Python: `Q8Activations` in worker/gpu/activations.py.
#pragma once
#include "codes.cuh"

struct Meta {
    float scale;
    short sum[2];
};

constexpr float kSmallestAmax = 1e-30f;  // 127/amax must be finite

// 4·QUADS adjacent elements a lane, of blocks of 32 in adjacent lanes; QUADS is 1 or 2. Called by
// all lanes of a warp; lanes that are not `valid` count as zeros. The sums over elements 0–15 and
// 16–31 are valid in a block's first lane.
template <int QUADS>
struct Q8Quads {
    u32 packed[QUADS];
    float scale;
    int low, high;
    __device__ __forceinline__ Q8Quads(const float4 (&x)[QUADS], bool valid) {
        constexpr int kLanes = 8 / QUADS;  // lanes of a block
        float amax = 0.f;
#pragma unroll
        for (int i = 0; i < QUADS; ++i)
            amax = fmaxf(amax, fmaxf(fmaxf(fabsf(x[i].x), fabsf(x[i].y)), fmaxf(fabsf(x[i].z), fabsf(x[i].w))));
        if (!valid) amax = 0.f;
#pragma unroll
        for (int lane = 1; lane < kLanes; lane *= 2) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, lane));
        const bool nonzero = amax >= kSmallestAmax;
        const float inverse = nonzero ? __fdiv_rn(127.f, amax) : 0.f;
        scale = nonzero ? __fdiv_rn(amax, 127.f) : 0.f;
        low = 0;
#pragma unroll
        for (int i = 0; i < QUADS; ++i) {
            const int a = __float2int_rn(__fmul_rn(x[i].x, inverse)), b = __float2int_rn(__fmul_rn(x[i].y, inverse));
            const int c = __float2int_rn(__fmul_rn(x[i].z, inverse)), d = __float2int_rn(__fmul_rn(x[i].w, inverse));
            packed[i] = (a & 255) | (b & 255) << 8 | (c & 255) << 16 | (u32)d << 24;
            low += a + b + c + d;
        }
#pragma unroll
        for (int lane = 1; lane < kLanes / 2; lane *= 2) low += __shfl_xor_sync(0xffffffffu, low, lane);
        high = __shfl_down_sync(0xffffffffu, low, kLanes / 2);
    }
};

// Store elements [column, column + 4·QUADS) of a row as q and meta; QUADS is 1 or 2. Called by all
// lanes of a warp, adjacent lanes with adjacent columns, the first lane with a multiple of 32.
// Columns from `cols` on are not stored.
template <int QUADS>
__device__ __forceinline__ void store_quantized(const float4 (&x)[QUADS], int column, int cols, u8* q, Meta* meta) {
    const Q8Quads<QUADS> v(x, column < cols);
    if (column >= cols) return;
    const int block = column / 32, e = column % 32;
    u8* to = q + (size_t)(e / 16) * (cols / 2) + block * 16 + e % 16;
    if (QUADS == 2) *reinterpret_cast<uint2*>(to) = make_uint2(v.packed[0], v.packed[QUADS - 1]);
    else *reinterpret_cast<u32*>(to) = v.packed[0];
    if (e == 0) meta[block] = {v.scale, {(short)v.low, (short)v.high}};
}

// One element a lane: the warp holds a block of 32. Scale and sums are those of the block; low and
// high are valid in lane 0.
struct Q8Lane {
    int code, low, high;
    float scale;
    __device__ __forceinline__ explicit Q8Lane(float x) {
        float amax = fabsf(x);
#pragma unroll
        for (int lane = 1; lane < 32; lane *= 2) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, lane));
        const bool nonzero = amax >= kSmallestAmax;
        code = __float2int_rn(__fmul_rn(x, nonzero ? __fdiv_rn(127.f, amax) : 0.f));
        scale = nonzero ? __fdiv_rn(amax, 127.f) : 0.f;
        low = code;
#pragma unroll
        for (int lane = 1; lane < 16; lane *= 2) low += __shfl_xor_sync(0xffffffffu, low, lane);
        high = __shfl_xor_sync(0xffffffffu, low, 16);
    }
};

// The same as `store_quantized` for one element a lane; the first column is a multiple of 32.
__device__ __forceinline__ void store_quantized_lane(float x, int column, int cols, u8* q, Meta* meta) {
    const Q8Lane v(x);
    const int block = column / 32, e = column % 32;
    q[(size_t)(e / 16) * (cols / 2) + block * 16 + e % 16] = (u8)v.code;
    if (e == 0) meta[block] = {v.scale, {(short)v.low, (short)v.high}};
}
