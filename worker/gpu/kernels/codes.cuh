// Quantization codes in planes: for a unit of 32 elements, LOW bits of each code in one plane and
// HIGH bits in another.
//
// | plane | bits a code | bytes a unit | layout |
// | --- | --- | --- | --- |
// | low | 2 | 8 | bits 2i, 2i+1 of byte k of word h: element 16h+4i+k |
// | low | 4 | 16 | byte k of word i: element 4i+k in the low nibble, 16+4i+k in the high one |
// | low | 4 (E2M1, IQ4) | 16 | nibble k of word i: element 4i+k; nibble 4+k: element 16+4i+k |
// | low, high | 8 | 16 each | elements 0–15; elements 16–31 |
// | high | 1 | 4 | bit i of byte k: element 4i+k |
// | high | 2 | 8 | the layout of the low 2 bits |
// Writer: repack.cu. Conversion of codes to values: formats.cuh. Sizes: worker/gpu/layouts.py.
#pragma once
#include "gguf_blocks.cuh"

struct Planes {
    const u8 *low, *high, *scales, *supers;
};

// Element `index` of a plane of T. With WEIGHTS_BYPASS_L1, which a launcher defines for its file,
// L1 keeps the activations. With WEIGHTS_EVICT_FIRST, which a kernel defines that reads each weight
// once, L1 and L2 keep all else.
template <class T>
__device__ __forceinline__ T load_plane(const u8* plane, u32 index) {
#if defined(WEIGHTS_EVICT_FIRST)
    return __ldcs(reinterpret_cast<const T*>(plane) + index);
#elif defined(WEIGHTS_BYPASS_L1)
    return __ldcg(reinterpret_cast<const T*>(plane) + index);
#else
    return __ldg(reinterpret_cast<const T*>(plane) + index);
#endif
}

// Codes of a unit, one byte each: word i holds elements 4i to 4i+3.
struct Codes {
    int w[8];
};

template <int SHIFT>
__device__ __forceinline__ u32 shifted(u32 v) {
    return SHIFT >= 0 ? v << (SHIFT >= 0 ? SHIFT : 0) : v >> (SHIFT < 0 ? -SHIFT : 0);
}

// Codes of one unit as loaded from the planes.
template <int LOW, int HIGH>
struct PackedCodes;

template <>
struct PackedCodes<4, 0> {
    uint4 low;
    __device__ void load(const Planes& p, u32 u) { low = load_plane<uint4>(p.low, u); }
    __device__ Codes unpack() const {
        const u32 v[4] = {low.x, low.y, low.z, low.w};
        Codes c;
#pragma unroll
        for (int i = 0; i < 4; ++i) c.w[i] = v[i] & 0x0f0f0f0f, c.w[i + 4] = v[i] >> 4 & 0x0f0f0f0f;
        return c;
    }
};

template <>
struct PackedCodes<4, 1> : PackedCodes<4, 0> {
    u32 high;
    __device__ void load(const Planes& p, u32 u) {
        PackedCodes<4, 0>::load(p, u);
        high = load_plane<u32>(p.high, u);
    }
    __device__ Codes unpack() const {
        Codes c = PackedCodes<4, 0>::unpack();
        c.w[0] |= shifted<4>(high) & 0x10101010, c.w[1] |= shifted<3>(high) & 0x10101010;
        c.w[2] |= shifted<2>(high) & 0x10101010, c.w[3] |= shifted<1>(high) & 0x10101010;
        c.w[4] |= shifted<0>(high) & 0x10101010, c.w[5] |= shifted<-1>(high) & 0x10101010;
        c.w[6] |= shifted<-2>(high) & 0x10101010, c.w[7] |= shifted<-3>(high) & 0x10101010;
        return c;
    }
};

// Inserts 2-bit codes at bit AT of every byte.
template <int AT>
__device__ __forceinline__ void insert_2_bits(Codes& c, uint2 pairs) {
    constexpr u32 mask = 0x03030303u << AT;
    const u32 v[2] = {pairs.x, pairs.y};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        c.w[4 * h] |= shifted<AT>(v[h]) & mask, c.w[4 * h + 1] |= shifted<AT - 2>(v[h]) & mask;
        c.w[4 * h + 2] |= shifted<AT - 4>(v[h]) & mask, c.w[4 * h + 3] |= shifted<AT - 6>(v[h]) & mask;
    }
}

template <>
struct PackedCodes<4, 2> : PackedCodes<4, 0> {
    uint2 high;
    __device__ void load(const Planes& p, u32 u) {
        PackedCodes<4, 0>::load(p, u);
        high = load_plane<uint2>(p.high, u);
    }
    __device__ Codes unpack() const {
        Codes c = PackedCodes<4, 0>::unpack();
        insert_2_bits<4>(c, high);
        return c;
    }
};

template <>
struct PackedCodes<2, 0> {
    uint2 low;
    __device__ void load(const Planes& p, u32 u) { low = load_plane<uint2>(p.low, u); }
    __device__ Codes unpack() const {
        Codes c = {};
        insert_2_bits<0>(c, low);
        return c;
    }
};

template <>
struct PackedCodes<2, 1> : PackedCodes<2, 0> {
    u32 high;
    __device__ void load(const Planes& p, u32 u) {
        PackedCodes<2, 0>::load(p, u);
        high = load_plane<u32>(p.high, u);
    }
    __device__ Codes unpack() const {
        Codes c = PackedCodes<2, 0>::unpack();
        c.w[0] |= shifted<2>(high) & 0x04040404, c.w[1] |= shifted<1>(high) & 0x04040404;
        c.w[2] |= shifted<0>(high) & 0x04040404, c.w[3] |= shifted<-1>(high) & 0x04040404;
        c.w[4] |= shifted<-2>(high) & 0x04040404, c.w[5] |= shifted<-3>(high) & 0x04040404;
        c.w[6] |= shifted<-4>(high) & 0x04040404, c.w[7] |= shifted<-5>(high) & 0x04040404;
        return c;
    }
};

template <>
struct PackedCodes<8, 0> {
    uint4 low, high;
    __device__ void load(const Planes& p, u32 u) {
        low = load_plane<uint4>(p.low, u);
        high = load_plane<uint4>(p.high, u);
    }
    __device__ Codes unpack() const {
        return {(int)low.x, (int)low.y, (int)low.z, (int)low.w, (int)high.x, (int)high.y, (int)high.z, (int)high.w};
    }
};

// E2M1 codes as 2·value + 12, bytes from 0 to 24, by two table lookups with `prmt`: one for codes 0
// to 7, one for 8 to 15. A lookup of a code of the other half gives 0: its selector has the top bit
// set, which makes `prmt` replicate the sign bit of a table byte, and no byte of the tables has
// one.
struct Fp4Codes {
    uint4 low;
    __device__ void load(const Planes& p, u32 u) { low = load_plane<uint4>(p.low, u); }
    __device__ static u32 lookup(u32 positive, u32 negative) {
        u32 a, b;
        asm("prmt.b32 %0, %1, %2, %3;" : "=r"(a) : "r"(0x0f0e0d0cu), "r"(0x18141210u), "r"(positive));
        asm("prmt.b32 %0, %1, %2, %3;" : "=r"(b) : "r"(0x090a0b0cu), "r"(0x00040608u), "r"(negative));
        return a | b;
    }
    __device__ Codes unpack() const {
        const u32 v[4] = {low.x, low.y, low.z, low.w};
        Codes c;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u32 flipped = v[i] ^ 0x88888888;
            c.w[i] = lookup(v[i], flipped), c.w[i + 4] = lookup(v[i] >> 16, flipped >> 16);
        }
        return c;
    }
};

// IQ4 codes as values from -127 to 113, by two table lookups as in Fp4Codes: one of the negated
// values of codes 0 to 7, one of the values of codes 8 to 15. The other lookup gives 0, and no byte
// borrows.
struct Iq4Codes {
    uint4 low;
    __device__ void load(const Planes& p, u32 u) { low = load_plane<uint4>(p.low, u); }
    __device__ static u32 lookup(u32 lower, u32 upper) {
        u32 a, b;
        asm("prmt.b32 %0, %1, %2, %3;" : "=r"(a) : "r"(0x4153687fu), "r"(0x0a162331u), "r"(lower));
        asm("prmt.b32 %0, %1, %2, %3;" : "=r"(b) : "r"(0x26190d01u), "r"(0x71594535u), "r"(upper));
        return ((b | 0x80808080) - a) ^ 0x80808080;
    }
    __device__ Codes unpack() const {
        const u32 v[4] = {low.x, low.y, low.z, low.w};
        Codes c;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u32 flipped = v[i] ^ 0x88888888;
            c.w[i] = lookup(v[i], flipped), c.w[i + 4] = lookup(v[i] >> 16, flipped >> 16);
        }
        return c;
    }
};

// Magnitudes of four codes and one sign bit of each, a byte each, as signed values. Magnitudes are
// below 128 and not 0, so bytes do not carry.
__device__ __forceinline__ u32 with_signs(u32 magnitudes, u32 negative) {
    return (magnitudes ^ negative * 255) + negative;
}

struct Iq3XxsValue {  // ±4, 12, 20, 28, 36, 44, 52, 62
    static __device__ __forceinline__ u32 of(u32 codes) {
        const u32 m = codes & 0x07070707;
        return with_signs(8 * m + 0x04040404 + (m + 0x01010101 >> 2 & 0x02020202), codes >> 3 & 0x01010101);
    }
};
struct Iq3SValue {  // ±1, 3, 5, …, 15
    static __device__ __forceinline__ u32 of(u32 codes) {
        return with_signs(2 * (codes & 0x07070707) + 0x01010101, codes >> 3 & 0x01010101);
    }
};
struct Iq2Value {  // ±8, 25, 43
    static __device__ __forceinline__ u32 of(u32 codes) {
        const u32 m = codes & 0x03030303;
        return with_signs(17 * m + 0x08080808 + (m >> 1 & 0x01010101), codes >> 2 & 0x01010101);
    }
};
struct Iq1Value {  // eight times -1, 0, 1, plus or minus 1
    static __device__ __forceinline__ u32 of(u32 codes) {
        return (8 * (codes & 0x03030303) + 0x79797979 - (codes >> 1 & 0x02020202)) ^ 0x80808080;
    }
};

// Packed codes that VALUE converts to signed bytes, four at once.
template <class PACKED, class VALUE>
struct ValueCodes {
    PACKED packed;
    __device__ void load(const Planes& p, u32 u) { packed.load(p, u); }
    __device__ Codes unpack() const {
        Codes c = packed.unpack();
#pragma unroll
        for (int i = 0; i < 8; ++i) c.w[i] = VALUE::of(c.w[i]);
        return c;
    }
};
