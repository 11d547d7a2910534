// Blocks of GGUF tensors in the file's layout: one struct for each type, with the type's name.
//
// `code(sub, e)` returns the raw code of element e of the block's sub-th 32 elements; formats.cuh
// converts codes to values. Types with a codebook, rows of 8 (IQ1, IQ2) or 4 (IQ3) magnitudes, have
// `code(sub, e, codebook)` with the magnitude in the lower bits and the sign above them
// (signed_code).
// Sizes are those of gguf.GGML_QUANT_SIZES. repack.cu reads these blocks once, when a model is
// loaded; other kernels use the struct names as template arguments only. Twin: `dequantize` in
// worker/quants.py.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;

struct F32 { float v; };
struct F16 { u16 v; };
struct BF16 { u16 v; };

__device__ __forceinline__ int nibble(const u8* qs, int e) { return e < 16 ? qs[e] & 15 : qs[e - 16] >> 4; }
__device__ __forceinline__ int bit(const u8* bits, int e) { return bits[e / 8] >> (e % 8) & 1; }

struct Q4_0 {
    u16 d;
    u8 qs[16];
    __device__ int code(int, int e) const { return nibble(qs, e); }
};

struct Q4_1 {
    u16 d, m;
    u8 qs[16];
    __device__ int code(int, int e) const { return nibble(qs, e); }
};

struct Q5_0 {
    u16 d;
    u8 qh[4], qs[16];
    __device__ int code(int, int e) const { return nibble(qs, e) | bit(qh, e) << 4; }
};

struct Q5_1 {
    u16 d, m;
    u8 qh[4], qs[16];
    __device__ int code(int, int e) const { return nibble(qs, e) | bit(qh, e) << 4; }
};

struct Q8_0 {
    u16 d;
    u8 qs[32];
    __device__ int code(int, int e) const { return qs[e]; }
};

struct MXFP4 {
    u8 e8m0, qs[16];
    __device__ int code(int, int e) const { return nibble(qs, e); }
};

struct Q2_K {
    u8 scales[16], qs[64];  // for each 16 elements a byte: scale in the low nibble, minimum in the high one
    u16 d, dmin;
    __device__ int code(int sub, int e) const { return qs[32 * (sub / 4) + e] >> 2 * (sub % 4) & 3; }
};

struct Q3_K {
    u8 hmask[32], qs[64], scales[12];
    u16 d;
    __device__ int code(int sub, int e) const {
        return (qs[32 * (sub / 4) + e] >> 2 * (sub % 4) & 3) | (hmask[e] >> sub & 1) << 2;
    }
    // Scale, 0 to 63, of the i-th 16 elements.
    __device__ int scale(int i) const {
        const int low = i < 8 ? scales[i] & 15 : scales[i - 8] >> 4;
        return low | (scales[8 + i % 4] >> 2 * (i / 4) & 3) << 4;
    }
};

// Scale and minimum, 0 to 63, of the i-th 32 elements of a Q4_K or Q5_K block.
__device__ __forceinline__ int k_scale(const u8* s, int i) {
    return i < 4 ? s[i] & 63 : (s[i + 4] & 15) | s[i - 4] >> 6 << 4;
}
__device__ __forceinline__ int k_min(const u8* s, int i) {
    return i < 4 ? s[i + 4] & 63 : s[i + 4] >> 4 | s[i] >> 6 << 4;
}

struct Q4_K {
    u16 d, dmin;
    u8 scales[12], qs[128];
    __device__ int code(int sub, int e) const { return qs[32 * (sub / 2) + e] >> 4 * (sub % 2) & 15; }
};

struct Q5_K {
    u16 d, dmin;
    u8 scales[12], qh[32], qs[128];
    __device__ int code(int sub, int e) const {
        return (qs[32 * (sub / 2) + e] >> 4 * (sub % 2) & 15) | (qh[e] >> sub & 1) << 4;
    }
};

struct Q6_K {
    u8 ql[128], qh[64];
    signed char scales[16];
    u16 d;
    __device__ int code(int sub, int e) const {
        const int low = ql[64 * (sub / 4) + 32 * (sub % 2) + e] >> 4 * (sub / 2 % 2) & 15;
        return low | (qh[32 * (sub / 4) + e] >> 2 * (sub % 4) & 3) << 4;
    }
};

struct IQ4_NL {
    u16 d;
    u8 qs[16];
    __device__ int code(int, int e) const { return nibble(qs, e); }
};

struct IQ4_XS {
    u16 d, scales_h;
    u8 scales_l[4], qs[128];
    __device__ int code(int sub, int e) const { return nibble(qs + 16 * sub, e); }
};

struct NVFP4 {
    u8 d[4], qs[32];  // for each 16 elements a scale (unsigned E4M3) and 8 bytes
    __device__ int code(int sub, int e) const {
        return qs[16 * sub + e / 16 * 8 + e % 8] >> (e % 16 < 8 ? 0 : 4) & 15;
    }
};

struct TQ2_0 {
    u8 qs[64];
    u16 d;
    __device__ int code(int sub, int e) const { return qs[32 * (sub / 4) + e] >> 2 * (sub % 4) & 3; }
};

// Ternary digits, five in a byte b: digit n is the integer part of 3·f, f the fraction of b·3^n /
// 256.
struct TQ1_0 {
    u8 qs[48], qh[4];
    u16 d;
    __device__ int code(int sub, int e) const {
        const int i = 32 * sub + e;
        if (i < 160) return digit(qs[i % 32], i / 32);
        if (i < 240) return digit(qs[32 + i % 16], (i - 160) / 16);
        return digit(qh[i % 4], (i - 240) / 4);
    }

private:
    __device__ static int digit(u32 byte, int n) {
        for (int i = 0; i < n; ++i) byte *= 3;
        return (byte & 255) * 3 >> 8;
    }
};

// A magnitude's index in the lower bits, 1 above them for the other sign.
template <int BITS>
__device__ __forceinline__ int signed_code(int magnitude, u32 negative) {
    return magnitude | (negative & 1) << BITS;
}
// The sign bits of 8 elements from 7 stored ones: the number of negative elements is even.
__device__ __forceinline__ u32 with_parity(u32 signs) { return signs | (__popc(signs) & 1) << 7; }
__device__ __forceinline__ u32 word_at(const u8* at) { return at[0] | at[1] << 8 | at[2] << 16 | (u32)at[3] << 24; }

// `scale(sub, half)`: the integer s of 16 elements, whose scale is a multiple of d·(2s + 1).
struct IQ2_XXS {
    u16 d;
    u8 qs[64];  // for each 32 elements: four rows of the codebook, then four times 7 signs and 4 bits of scale
    __device__ int code(int sub, int e, const u8* codebook) const {
        const u32 signs = with_parity(word_at(qs + 8 * sub + 4) >> 7 * (e / 8) & 127);
        return signed_code<2>(codebook[8 * qs[8 * sub + e / 8] + e % 8], signs >> e % 8);
    }
    __device__ u32 scale(int sub, int) const { return qs[8 * sub + 7] >> 4; }
    __device__ u16 super() const { return d; }
};

struct IQ2_XS {
    u16 d, qs[32];
    u8 scales[8];
    __device__ int code(int sub, int e, const u8* codebook) const {
        const u32 q = qs[4 * sub + e / 8];
        return signed_code<2>(codebook[8 * (q & 511) + e % 8], with_parity(q >> 9) >> e % 8);
    }
    __device__ u32 scale(int sub, int half) const { return scales[sub] >> 4 * half & 15; }
    __device__ u16 super() const { return d; }
};

struct IQ2_S {
    u16 d;
    u8 qs[32], signs[32], qh[8], scales[8];
    __device__ int code(int sub, int e, const u8* codebook) const {
        const int i = 4 * sub + e / 8, row = qs[i] | (qh[sub] >> 2 * (e / 8) & 3) << 8;
        return signed_code<2>(codebook[8 * row + e % 8], signs[i] >> e % 8);
    }
    __device__ u32 scale(int sub, int half) const { return scales[sub] >> 4 * half & 15; }
    __device__ u16 super() const { return d; }
};

struct IQ3_XXS {
    u16 d;
    u8 qs[64], signs_scales[32];  // for each 32 elements: eight rows; four times 7 signs and 4 bits of scale
    __device__ int code(int sub, int e, const u8* codebook) const {
        const u32 signs = with_parity(word_at(signs_scales + 4 * sub) >> 7 * (e / 8) & 127);
        return signed_code<3>(codebook[4 * qs[8 * sub + e / 4] + e % 4], signs >> e % 8);
    }
    __device__ u32 scale(int sub, int) const { return signs_scales[4 * sub + 3] >> 4; }
    __device__ u16 super() const { return d; }
};

struct IQ3_S {
    u16 d;
    u8 qs[64], qh[8], signs[32], scales[4];
    __device__ int code(int sub, int e, const u8* codebook) const {
        const int row = qs[8 * sub + e / 4] | (qh[sub] >> e / 4 & 1) << 8;
        return signed_code<3>(codebook[4 * row + e % 4], signs[4 * sub + e / 8] >> e % 8);
    }
    __device__ u32 scale(int sub, int) const { return scales[sub / 2] >> 4 * (sub % 2) & 15; }
    __device__ u16 super() const { return d; }
};

// IQ1: elements are -1, 0 and 1 plus or minus 1/8; the sign is that of the eighth.
struct IQ1_S {
    u16 d;
    u8 qs[32];
    u16 qh[8];
    __device__ int code(int sub, int e, const u8* codebook) const {
        const int row = qs[4 * sub + e / 8] | (qh[sub] >> 3 * (e / 8) & 7) << 8;
        return signed_code<2>(codebook[8 * row + e % 8], qh[sub] >> 15);
    }
    __device__ u32 scale(int sub, int) const { return qh[sub] >> 12 & 7; }
    __device__ u16 super() const { return d; }
};

struct IQ1_M {
    u8 qs[32], qh[16];
    u16 scales[4];  // each: four times 3 bits, and 4 bits of the block's scale
    __device__ int code(int sub, int e, const u8* codebook) const {
        const int i = 4 * sub + e / 8, high = qh[i / 2] >> 4 * (i % 2);
        return signed_code<2>(codebook[8 * (qs[i] | (high & 7) << 8) + e % 8], high >> 3);
    }
    __device__ u32 scale(int sub, int half) const { return scales[sub / 2] >> (6 * (sub % 2) + 3 * half) & 7; }
    __device__ u16 super() const {
        return scales[0] >> 12 | scales[1] >> 12 << 4 | scales[2] >> 12 << 8 | scales[3] >> 12 << 12;
    }
};

struct IQ1;  // formats of VRAM alone: the values of the three IQ2 types, and of both IQ1 types
struct IQ2;

static_assert(sizeof(Q4_0) == 18 && sizeof(Q4_1) == 20 && sizeof(Q5_0) == 22 && sizeof(Q5_1) == 24, "size in the file");
static_assert(sizeof(Q8_0) == 34 && sizeof(MXFP4) == 17, "size in the file");
static_assert(sizeof(Q2_K) == 84 && sizeof(Q3_K) == 110, "size in the file");
static_assert(sizeof(Q4_K) == 144 && sizeof(Q5_K) == 176 && sizeof(Q6_K) == 210, "size in the file");
static_assert(sizeof(IQ1_S) == 50 && sizeof(IQ1_M) == 56 && sizeof(IQ2_XXS) == 66 && sizeof(IQ2_XS) == 74 &&
                  sizeof(IQ2_S) == 82 && sizeof(IQ3_XXS) == 98 && sizeof(IQ3_S) == 110,
              "size in the file");
static_assert(sizeof(IQ4_NL) == 18 && sizeof(IQ4_XS) == 136 && sizeof(NVFP4) == 36 && sizeof(TQ1_0) == 54 &&
                  sizeof(TQ2_0) == 66,
              "size in the file");
