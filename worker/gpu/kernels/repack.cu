// Loading: rearrange a matrix's blocks from the file's layout into planes (codes.cuh, scales.cuh).
//
// Shapes: blocks [units/kSubs] of the file; codebook [rows][8 or 4] u8 of the types that have one:
// indices of magnitudes (gguf_blocks.cuh); target planes, sizes in worker/gpu/layouts.py.
// Grid: ⌈units/256⌉ blocks of 256 threads, one unit of 32 elements each; the first thread of a
// block of the file also writes what its units share. Alignment: source and planes 16 bytes. Bytes:
// the file's bytes read (byte by byte), those of the planes written; the copy to the device takes
// longer.
// Twin: none; dequantize.cu of the result equals gguf.quants.
// Launcher: worker/gpu/upload.py.
#include "scales.cuh"

struct TargetPlanes {
    u8 *low, *high, *scales, *supers;
};

template <class T>
__device__ void put(u8* plane, u32 index, T value) {
    reinterpret_cast<T*>(plane)[index] = value;
}

// A word with the low four bits of field(i) in nibble i.
template <class Field>
__device__ u32 pack_nibbles(Field field) {
    u32 word = 0;
    for (int i = 0; i < 8; ++i) word |= (field(i) & 15u) << 4 * i;
    return word;
}

// The layout that unpack_6_bits of scales.cuh reads.
template <class First, class Second>
__device__ void pack_6_bits(First first, Second second, u32 (&w)[3]) {
    w[0] = pack_nibbles(first);
    w[1] = pack_nibbles(second);
    w[2] = pack_nibbles([&](int i) { return first(i) >> 4 | second(i) >> 4 << 2; });
}

// ---- codes

template <int LOW, int HIGH, bool FP4 = false>
struct CodePacking {
    static __device__ void put_codes(const u8 (&code)[32], const TargetPlanes& t, u32 u) {
        if (LOW == 8) {
            for (int e = 0; e < 32; ++e) (e < 16 ? t.low : t.high)[u * 16ull + e % 16] = code[e];
            return;
        }
        u32 low[4] = {}, high[2] = {};
        for (int e = 0; e < 32; ++e) {
            const int word = e / 4 % 4, byte = e % 4, upper = e / 16;
            if (LOW == 4) low[word] |= (code[e] & 15u) << (FP4 ? 16 * upper + 4 * byte : 8 * byte + 4 * upper);
            if (LOW == 2) low[upper] |= (code[e] & 3u) << (8 * byte + 2 * word);
            if (HIGH == 2) high[upper] |= (u32)(code[e] >> LOW) << (8 * byte + 2 * word);
            if (HIGH == 1) high[0] |= (u32)(code[e] >> LOW) << (8 * byte + e / 4);
        }
        if (LOW == 4) put(t.low, u, make_uint4(low[0], low[1], low[2], low[3]));
        if (LOW == 2) put(t.low, u, make_uint2(low[0], low[1]));
        if (HIGH == 2) put(t.high, u, make_uint2(high[0], high[1]));
        if (HIGH == 1) put(t.high, u, high[0]);
    }
};

// ---- scales

struct OneF16 {
    template <class Block>
    static __device__ void put_scales(const Block& b, int, const TargetPlanes& t, u32 u) { put(t.scales, u, b.d); }
};

struct F16AndMin {
    template <class Block>
    static __device__ void put_scales(const Block& b, int, const TargetPlanes& t, u32 u) {
        put(t.scales, u, (u32)b.d | (u32)b.m << 16);
    }
};

struct OneByte {
    static __device__ void put_scales(const MXFP4& b, int, const TargetPlanes& t, u32 u) { t.scales[u] = b.e8m0; }
};

struct SixBitAndMin {
    template <class Block>
    static __device__ void put_scales(const Block& b, int sub, const TargetPlanes& t, u32 u) {
        if (sub) return;
        u32 w[3];
        pack_6_bits([&](int i) { return (u32)k_scale(b.scales, i); },
                      [&](int i) { return (u32)k_min(b.scales, i); }, w);
        put(t.supers, u / 8, make_uint4((u32)b.d | (u32)b.dmin << 16, w[0], w[1], w[2]));
    }
};

struct Q2Packing {
    static __device__ void put_scales(const Q2_K& b, int sub, const TargetPlanes& t, u32 u) {
        put(t.scales, u, (u16)(b.scales[2 * sub] | b.scales[2 * sub + 1] << 8));
        if (sub == 0) put(t.supers, u / 8, (u32)b.d | (u32)b.dmin << 16);
    }
};

struct Q3Packing {
    static __device__ void put_scales(const Q3_K& b, int sub, const TargetPlanes& t, u32 u) {
        if (sub) return;
        u32 w[3];
        pack_6_bits([&](int i) { return (u32)b.scale(2 * i); }, [&](int i) { return (u32)b.scale(2 * i + 1); }, w);
        for (int i = 0; i < 3; ++i) put(t.scales, u / 8 * 3 + i, w[i]);
        put(t.supers, u / 8, b.d);
    }
};

struct Q6Packing {
    static __device__ void put_scales(const Q6_K& b, int sub, const TargetPlanes& t, u32 u) {
        put(t.scales, u, (u16)((u8)b.scales[2 * sub] | (u8)b.scales[2 * sub + 1] << 8));
        if (sub == 0) put(t.supers, u / 8, b.d);
    }
};

struct Iq4Packing {
    static __device__ void put_scales(const IQ4_XS& b, int sub, const TargetPlanes& t, u32 u) {
        if (sub == 0) put(t.supers, u / 8, make_uint2((u32)b.d | (u32)b.scales_h << 16, word_at(b.scales_l)));
    }
};

struct E4m3Packing {
    static __device__ void put_scales(const NVFP4& b, int sub, const TargetPlanes& t, u32 u) {
        put(t.scales, u, (u16)(scale(b.d[2 * sub]) | scale(b.d[2 * sub + 1]) << 8));
    }

private:
    static __device__ u32 scale(u8 e4m3) { return e4m3 == 0x7f ? 0 : e4m3; }  // 0x7f, a NaN, counts as 0
};

struct SuperPacking {
    template <class Block>
    static __device__ void put_scales(const Block& b, int sub, const TargetPlanes& t, u32 u) {
        if (sub == 0) put(t.supers, u / 8, b.d);
    }
};

struct CodebookPacking {
    template <class Block>
    static __device__ void put_scales(const Block& b, int sub, const TargetPlanes& t, u32 u) {
        t.scales[u] = b.scale(sub, 0) | b.scale(sub, 1) << 4;
        if (sub == 0) put(t.supers, u / 8, b.super());
    }
};

template <class Codes, class Scales, int SUBS, bool CODEBOOK = false>
struct Layout : Codes, Scales {
    static constexpr int kSubs = SUBS;  // units of a block
    static constexpr bool kCodebook = CODEBOOK;
};
template <int LOW, int HIGH>
using CodebookLayout = Layout<CodePacking<LOW, HIGH>, CodebookPacking, 8, true>;

template <class Block> struct LayoutOf;
template <> struct LayoutOf<Q4_0> : Layout<CodePacking<4, 0>, OneF16, 1> {};
template <> struct LayoutOf<Q4_1> : Layout<CodePacking<4, 0>, F16AndMin, 1> {};
template <> struct LayoutOf<Q5_0> : Layout<CodePacking<4, 1>, OneF16, 1> {};
template <> struct LayoutOf<Q5_1> : Layout<CodePacking<4, 1>, F16AndMin, 1> {};
template <> struct LayoutOf<Q8_0> : Layout<CodePacking<8, 0>, OneF16, 1> {};
template <> struct LayoutOf<MXFP4> : Layout<CodePacking<4, 0, true>, OneByte, 1> {};
template <> struct LayoutOf<Q2_K> : Layout<CodePacking<2, 0>, Q2Packing, 8> {};
template <> struct LayoutOf<Q3_K> : Layout<CodePacking<2, 1>, Q3Packing, 8> {};
template <> struct LayoutOf<Q4_K> : Layout<CodePacking<4, 0>, SixBitAndMin, 8> {};
template <> struct LayoutOf<Q5_K> : Layout<CodePacking<4, 1>, SixBitAndMin, 8> {};
template <> struct LayoutOf<Q6_K> : Layout<CodePacking<4, 2>, Q6Packing, 8> {};
template <> struct LayoutOf<NVFP4> : Layout<CodePacking<4, 0, true>, E4m3Packing, 2> {};
template <> struct LayoutOf<IQ4_NL> : Layout<CodePacking<4, 0, true>, OneF16, 1> {};
template <> struct LayoutOf<IQ4_XS> : Layout<CodePacking<4, 0, true>, Iq4Packing, 8> {};
template <> struct LayoutOf<IQ3_XXS> : CodebookLayout<4, 0> {};
template <> struct LayoutOf<IQ3_S> : CodebookLayout<4, 0> {};
template <> struct LayoutOf<IQ2_XXS> : CodebookLayout<2, 1> {};
template <> struct LayoutOf<IQ2_XS> : CodebookLayout<2, 1> {};
template <> struct LayoutOf<IQ2_S> : CodebookLayout<2, 1> {};
template <> struct LayoutOf<IQ1_S> : CodebookLayout<2, 1> {};
template <> struct LayoutOf<IQ1_M> : CodebookLayout<2, 1> {};
template <> struct LayoutOf<TQ1_0> : Layout<CodePacking<2, 0>, SuperPacking, 8> {};
template <> struct LayoutOf<TQ2_0> : Layout<CodePacking<2, 0>, SuperPacking, 8> {};

template <class Block>
__global__ void repack(const Block* __restrict__ blocks, const u8* __restrict__ codebook, const TargetPlanes target,
                       const u32 units) {
    const u32 u = blockIdx.x * blockDim.x + threadIdx.x;
    if (u >= units) return;
    using L = LayoutOf<Block>;
    const Block& block = blocks[u / L::kSubs];
    const int sub = u % L::kSubs;
    u8 code[32];
#pragma unroll
    for (int e = 0; e < 32; ++e) {
        if constexpr (L::kCodebook)
            code[e] = (u8)block.code(sub, e, codebook);
        else
            code[e] = (u8)block.code(sub, e);
    }
    L::put_codes(code, target, u);
    L::put_scales(block, sub, target, u);
}
