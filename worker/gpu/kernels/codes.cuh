// Codes as they lie in planes: LOW bits of a unit of 32 elements in one plane, HIGH bits in another.
//
// low     4 bits: 16 bytes, byte k of word i holds element 4i+k below and 16+4i+k above; E2M1: nibble k of word i holds
//         4i+k, nibble 4+k holds 16+4i+k. 2 bits: 8 bytes, bits 2i of byte k of word h hold element 16h+4i+k.
//         8 bits: elements 0–15.
// high    1 bit: 4 bytes, bit i of byte k holds element 4i+k. 2 bits: as the low 2 bits. 8 bits: elements 16–31.
// Written by repack.cu; what a code is worth: formats.cuh.
#pragma once
#include "blocks.cuh"

struct Planes {
    const u8 *low, *high, *scales, *supers;
};

template <class T>
__device__ __forceinline__ T load_plane(const u8* plane, u32 index) {
    return __ldg(reinterpret_cast<const T*>(plane) + index);
}

// A unit's codes, a byte each and four to a word: word i holds elements 4i to 4i+3.
struct Codes {
    int w[8];
};

template <int SHIFT>
__device__ __forceinline__ u32 shifted(u32 v) {
    return SHIFT >= 0 ? v << (SHIFT >= 0 ? SHIFT : 0) : v >> (SHIFT < 0 ? -SHIFT : 0);
}

template <int LOW, int HIGH>
struct Bits;

template <>
struct Bits<4, 0> {
    uint4 low;
    __device__ void load(const Planes& p, u32 u) { low = load_plane<uint4>(p.low, u); }
    __device__ Codes codes() const {
        const u32 v[4] = {low.x, low.y, low.z, low.w};
        Codes c;
#pragma unroll
        for (int i = 0; i < 4; ++i) c.w[i] = v[i] & 0x0f0f0f0f, c.w[i + 4] = v[i] >> 4 & 0x0f0f0f0f;
        return c;
    }
};

template <>
struct Bits<4, 1> : Bits<4, 0> {
    u32 high;
    __device__ void load(const Planes& p, u32 u) {
        Bits<4, 0>::load(p, u);
        high = load_plane<u32>(p.high, u);
    }
    __device__ Codes codes() const {
        Codes c = Bits<4, 0>::codes();
        c.w[0] |= shifted<4>(high) & 0x10101010, c.w[1] |= shifted<3>(high) & 0x10101010;
        c.w[2] |= shifted<2>(high) & 0x10101010, c.w[3] |= shifted<1>(high) & 0x10101010;
        c.w[4] |= shifted<0>(high) & 0x10101010, c.w[5] |= shifted<-1>(high) & 0x10101010;
        c.w[6] |= shifted<-2>(high) & 0x10101010, c.w[7] |= shifted<-3>(high) & 0x10101010;
        return c;
    }
};

// Adds 2-bit codes at bit AT of every byte.
template <int AT>
__device__ __forceinline__ void add_pairs(Codes& c, uint2 pairs) {
    constexpr u32 mask = 0x03030303u << AT;
    const u32 v[2] = {pairs.x, pairs.y};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        c.w[4 * h] |= shifted<AT>(v[h]) & mask, c.w[4 * h + 1] |= shifted<AT - 2>(v[h]) & mask;
        c.w[4 * h + 2] |= shifted<AT - 4>(v[h]) & mask, c.w[4 * h + 3] |= shifted<AT - 6>(v[h]) & mask;
    }
}

template <>
struct Bits<4, 2> : Bits<4, 0> {
    uint2 high;
    __device__ void load(const Planes& p, u32 u) {
        Bits<4, 0>::load(p, u);
        high = load_plane<uint2>(p.high, u);
    }
    __device__ Codes codes() const {
        Codes c = Bits<4, 0>::codes();
        add_pairs<4>(c, high);
        return c;
    }
};

template <>
struct Bits<2, 0> {
    uint2 low;
    __device__ void load(const Planes& p, u32 u) { low = load_plane<uint2>(p.low, u); }
    __device__ Codes codes() const {
        Codes c = {};
        add_pairs<0>(c, low);
        return c;
    }
};

template <>
struct Bits<2, 1> : Bits<2, 0> {
    u32 high;
    __device__ void load(const Planes& p, u32 u) {
        Bits<2, 0>::load(p, u);
        high = load_plane<u32>(p.high, u);
    }
    __device__ Codes codes() const {
        Codes c = Bits<2, 0>::codes();
        c.w[0] |= shifted<2>(high) & 0x04040404, c.w[1] |= shifted<1>(high) & 0x04040404;
        c.w[2] |= shifted<0>(high) & 0x04040404, c.w[3] |= shifted<-1>(high) & 0x04040404;
        c.w[4] |= shifted<-2>(high) & 0x04040404, c.w[5] |= shifted<-3>(high) & 0x04040404;
        c.w[6] |= shifted<-4>(high) & 0x04040404, c.w[7] |= shifted<-5>(high) & 0x04040404;
        return c;
    }
};

template <>
struct Bits<8, 0> {
    uint4 low, high;
    __device__ void load(const Planes& p, u32 u) {
        low = load_plane<uint4>(p.low, u);
        high = load_plane<uint4>(p.high, u);
    }
    __device__ Codes codes() const {
        return {(int)low.x, (int)low.y, (int)low.z, (int)low.w, (int)high.x, (int)high.y, (int)high.z, (int)high.w};
    }
};

// E2M1 codes as twice their value plus 12, so that all are bytes from 0 to 24 and a lookup that misses can give 0:
// a permutation whose selector has its top bit set repeats a sign, which here is 0.
struct Fp4Bits {
    uint4 low;
    __device__ void load(const Planes& p, u32 u) { low = load_plane<uint4>(p.low, u); }
    __device__ static u32 look_up(u32 positive, u32 negative) {
        u32 a, b;
        asm("prmt.b32 %0, %1, %2, %3;" : "=r"(a) : "r"(0x0f0e0d0cu), "r"(0x18141210u), "r"(positive));
        asm("prmt.b32 %0, %1, %2, %3;" : "=r"(b) : "r"(0x090a0b0cu), "r"(0x00040608u), "r"(negative));
        return a | b;
    }
    __device__ Codes codes() const {
        const u32 v[4] = {low.x, low.y, low.z, low.w};
        Codes c;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u32 flipped = v[i] ^ 0x88888888;
            c.w[i] = look_up(v[i], flipped), c.w[i + 4] = look_up(v[i] >> 16, flipped >> 16);
        }
        return c;
    }
};
