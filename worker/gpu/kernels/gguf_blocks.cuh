// Blocks of GGUF tensors in the file's layout: one struct for each type, with the type's name.
//
// `code(sub, e)` returns the raw code of element e of the block's sub-th 32 elements; formats.cuh
// converts codes to values.
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

static_assert(sizeof(Q4_0) == 18 && sizeof(Q4_1) == 20 && sizeof(Q5_0) == 22 && sizeof(Q5_1) == 24, "size in the file");
static_assert(sizeof(Q8_0) == 34 && sizeof(MXFP4) == 17, "size in the file");
static_assert(sizeof(Q2_K) == 84 && sizeof(Q3_K) == 110, "size in the file");
static_assert(sizeof(Q4_K) == 144 && sizeof(Q5_K) == 176 && sizeof(Q6_K) == 210, "size in the file");
