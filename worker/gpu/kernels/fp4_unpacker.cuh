// E2M1 codes of MXFP4 as bytes for the int8 tensor cores, a word of 8 codes at a time.
#pragma once
#include "formats.cuh"

// Unpacks E2M1 codes with the tables of `Fp4Codes::lookup` (codes.cuh). `zero` is 0, which the
// compiler does not know, and may differ between threads for what it knows: so the tables stay in
// registers, while constants and uniform registers would be moved for each lookup, and the shift
// remains a multiplication. Lookups fill the pipe of shifts and logic, multiplications another one,
// which they share with the MMA and its sums: shifts are better where several MMAs use a fragment.
struct Fp4Unpacker {
    u32 positive, negative, two_16;
    __device__ __forceinline__ explicit Fp4Unpacker(u32 zero)
        : positive(0x0f0e0d0c + zero), negative(0x090a0b0c + zero), two_16(0x10000 + zero) {}
    // Four codes as bytes, 2·value + 12 or, SIGNED, 2·value. Of the two lookups one is 0; bytes do
    // not carry.
    template <bool SIGNED>
    __device__ __forceinline__ u32 lookup(u32 codes, u32 flipped) const {
        u32 a, b;
        asm("prmt.b32 %0, %1, %2, %3;" : "=r"(a) : "r"(positive), "r"(0x18141210u), "r"(codes));
        asm("prmt.b32 %0, %1, %2, %3;" : "=r"(b) : "r"(negative), "r"(0x00040608u), "r"(flipped));
        return SIGNED ? (a + b + 0x01010101 * (128 - Unit<MXFP4>::kZero)) ^ 0x80808080 : a | b;
    }
    template <bool SHIFTS>
    __device__ __forceinline__ u32 upper(u32 word) const {
        return SHIFTS ? word >> 16 : __umulhi(word, two_16);
    }
    // The lower four codes of a word and the upper four.
    template <bool SIGNED, bool SHIFTS>
    __device__ __forceinline__ void unpack(u32 word, u32& low, u32& high) const {
        const u32 flipped = word ^ 0x88888888;
        low = lookup<SIGNED>(word, flipped);
        high = lookup<SIGNED>(upper<SHIFTS>(word), upper<SHIFTS>(flipped));
    }
};
