// Activations of decode as 8-bit integers: blocks of 32 with one scale, x ≈ scale·q, as ggml's Q8_1 has them.
//
// A row of `cols` (a multiple of 32) is `q` i8, the elements 0–15 of all blocks before the elements 16–31 of all, and
// `meta`, 8 bytes a block: the scale amax/127 and the sums of q over either half (they pay for codes' zero points and
// minima). q = x·(127/amax) rounded to nearest even; a block below 1e-30 is zeros. Rows follow each other at cols and
// cols/32·8 bytes. Relative error a product: a step is 1/127 of the block's largest, so about 0.5 % of the norm for
// normally distributed x, at most 1.3 % for one outlier a block. Twin: `quantize` in worker/cpu/quantized.py.
#pragma once
#include "codes.cuh"

struct Meta {
    float scale;
    short sum[2];
};

// Stores elements [column, column + 4·QUADS) of a row, QUADS 1 or 2. Every lane of the warp calls it, neighbouring lanes with
// neighbouring columns, the first lane's a multiple of 32; columns from `cols` on are not stored.
template <int QUADS>
__device__ __forceinline__ void store_quantized(const float4 (&x)[QUADS], int column, int cols, u8* q, Meta* meta) {
    constexpr int kLanes = 8 / QUADS;  // of a block
    float amax = 0.f;
#pragma unroll
    for (int i = 0; i < QUADS; ++i)
        amax = fmaxf(amax, fmaxf(fmaxf(fabsf(x[i].x), fabsf(x[i].y)), fmaxf(fabsf(x[i].z), fabsf(x[i].w))));
    if (column >= cols) amax = 0.f;
#pragma unroll
    for (int lane = 1; lane < kLanes; lane *= 2) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, lane));
    const bool some = amax >= 1e-30f;
    const float inverse = some ? __fdiv_rn(127.f, amax) : 0.f;
    u32 packed[QUADS];
    int sum = 0;
#pragma unroll
    for (int i = 0; i < QUADS; ++i) {
        const int a = __float2int_rn(__fmul_rn(x[i].x, inverse)), b = __float2int_rn(__fmul_rn(x[i].y, inverse));
        const int c = __float2int_rn(__fmul_rn(x[i].z, inverse)), d = __float2int_rn(__fmul_rn(x[i].w, inverse));
        packed[i] = (a & 255) | (b & 255) << 8 | (c & 255) << 16 | (u32)d << 24;
        sum += a + b + c + d;
    }
#pragma unroll
    for (int lane = 1; lane < kLanes / 2; lane *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
    const int upper = __shfl_down_sync(0xffffffffu, sum, kLanes / 2);
    if (column >= cols) return;
    const int block = column / 32, e = column % 32;
    u8* to = q + (size_t)(e / 16) * (cols / 2) + block * 16 + e % 16;
    if (QUADS == 2) *reinterpret_cast<uint2*>(to) = make_uint2(packed[0], packed[QUADS - 1]);
    else *reinterpret_cast<u32*>(to) = packed[0];
    if (e == 0) meta[block] = {some ? __fdiv_rn(amax, 127.f) : 0.f, {(short)sum, (short)upper}};
}

// The same for one element a lane: the warp holds a block of 32, its first column a multiple of 32.
__device__ __forceinline__ void store_quantized_lane(float x, int column, int cols, u8* q, Meta* meta) {
    float amax = fabsf(x);
#pragma unroll
    for (int lane = 1; lane < 32; lane *= 2) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, lane));
    const bool some = amax >= 1e-30f;
    const int code = __float2int_rn(__fmul_rn(x, some ? __fdiv_rn(127.f, amax) : 0.f));
    int sum = code;
#pragma unroll
    for (int lane = 1; lane < 16; lane *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
    const int upper = __shfl_xor_sync(0xffffffffu, sum, 16), block = column / 32, e = column % 32;
    q[(size_t)(e / 16) * (cols / 2) + block * 16 + e % 16] = (u8)code;
    if (e == 0) meta[block] = {some ? __fdiv_rn(amax, 127.f) : 0.f, {(short)sum, (short)upper}};
}
