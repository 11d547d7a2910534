// Paged KV cache: KV blocks of 16 tokens, addressed through each sequence's block table, and how a
// key or value is stored in them.
//
// One layer's keys are [blocks, Hk] head blocks, and so are its values: the 16 rows of one head in
// one KV block, contiguous, in one of two forms (`KvType` in worker/model.py):
// | form  | head block                         | bytes    | element                         |
// | F16Kv | [16][D] f16                        | 32·D     | f16, clamped to ±65504          |
// | Q8Kv  | [16][D] u8 codes, [16] f16 scales  | 16·(D+2) | (code - 128)/64 · scale of row  |
// Q8Kv: after a clamp to ±65024, the scale is the row's greatest magnitude times 64/127, rounded to
// f16; a code is 128 + 64 · element/scale, rounded to nearest even, from 1 to 255. So a row's bits
// depend on that key or value alone. (code - 128)/64 is exact in f16. A row with a NaN has it as
// scale.
// The scales of the rows 2c, 2c + 1, 2c + 8, 2c + 9 are neighbours: a lane needs them in decode.
// Every row is 16-byte aligned. Python: KV_BLOCK in worker/ops.py.
// Twin: worker/cpu/kv_cache.py.
#pragma once
#include "half.cuh"
#include "warp.cuh"

constexpr int kKvBlock = KV_BLOCK;

struct F16Kv {
    using Element = unsigned short;
    static constexpr bool kQuantized = false;

    // Where the row of a position begins, in elements.
    template <int D>
    __device__ __forceinline__ static size_t row(int block, int n_kv_heads, int kv_head, int position) {
        return row(block, n_kv_heads, kv_head, position, D);
    }
    __device__ __forceinline__ static size_t row(int block, int n_kv_heads, int kv_head, int position, int dim) {
        return (((size_t)block * n_kv_heads + kv_head) * kKvBlock + position % kKvBlock) * dim;
    }
    template <int D>
    struct Row {  // one key or value
        unsigned short elements[D];
    };

    // The scale of the row of a position; eight and two elements of a row with this scale, in f32.
    template <int D>
    __device__ __forceinline__ static float row_scale(const unsigned short*, int) {
        return 1.f;
    }
    __device__ __forceinline__ static void load_eight(const unsigned short* from, float, float (&out)[8]) {
        unpack8(*reinterpret_cast<const uint4*>(from), out);
    }
    __device__ __forceinline__ static float2 load_two(const unsigned short* from, float) {
        return half2_to_float2(*reinterpret_cast<const unsigned int*>(from));
    }
};

struct Q8Kv {
    using Element = unsigned char;
    static constexpr bool kQuantized = true;
    template <int D>
    static constexpr int kHeadBlock = kKvBlock * (D + 2);  // bytes

    template <int D>
    __device__ __forceinline__ static size_t row(int block, int n_kv_heads, int kv_head, int position) {
        return ((size_t)block * n_kv_heads + kv_head) * kHeadBlock<D> + position % kKvBlock * D;
    }
    template <int D>
    struct Row {
        unsigned char elements[D];
        unsigned short scale;
    };

    // The index of a position's scale among the scales of its head block.
    __device__ __forceinline__ static int scale_index(int position) {
        return position % 8 / 2 * 4 + position % kKvBlock / 8 * 2 + position % 2;
    }
    // The scale of a position, of the head block at `from`, in f16.
    template <int D>
    __device__ __forceinline__ static unsigned short scale_bits(const unsigned char* from, int position) {
        return reinterpret_cast<const unsigned short*>(from + kKvBlock * D)[scale_index(position)];
    }
    // Four codes as (code - 128)/64 in two pairs of f16. A byte b below the byte 0x64 is the f16
    // 1024 + b.
    __device__ __forceinline__ static uint2 halves(unsigned int codes) {
        const unsigned int factor = 0x24002400, offset = 0xcc80cc80;  // 1/64, -1152/64
        return make_uint2(half2_fma(__byte_perm(codes, 0x64646464, 0x4140), factor, offset),
                          half2_fma(__byte_perm(codes, 0x64646464, 0x4342), factor, offset));
    }

    template <int D>
    __device__ __forceinline__ static float row_scale(const unsigned char* row, int position) {
        return half_to_float(scale_bits<D>(row - position % kKvBlock * D, position));
    }
    __device__ __forceinline__ static void load_eight(const unsigned char* from, float scale, float (&out)[8]) {
        const uint2 codes = *reinterpret_cast<const uint2*>(from), a = halves(codes.x), b = halves(codes.y);
        unpack8(make_uint4(a.x, a.y, b.x, b.y), out);
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = __fmul_rn(out[i], scale);
    }
    __device__ __forceinline__ static float2 load_two(const unsigned char* from, float scale) {
        const float2 v = half2_to_float2(halves(*reinterpret_cast<const unsigned short*>(from)).x);
        return make_float2(__fmul_rn(v.x, scale), __fmul_rn(v.y, scale));
    }
};

// A key or value that a warp quantizes: a lane has the elements lane, lane + 32, …
template <int D>
struct Q8Row {
    unsigned char codes[D / 32];
    unsigned short scale;

    __device__ __forceinline__ explicit Q8Row(const float (&x)[D / 32]) {
        float peak = 0.f;
        bool nan = false;
#pragma unroll
        for (int i = 0; i < D / 32; ++i) peak = fmaxf(peak, fabsf(x[i])), nan |= x[i] != x[i];
        scale = float_to_half(__fmul_rn(fminf(warp_max(peak), kLimit), 64.f / 127.f));
        const float factor = scale ? __fdiv_rn(64.f, half_to_float(scale)) : 0.f;
#pragma unroll
        for (int i = 0; i < D / 32; ++i) {
            const float code = __fmul_rn(fmaxf(fminf(x[i], kLimit), -kLimit), factor);
            codes[i] = (unsigned char)(128 + __float2int_rn(fmaxf(fminf(code, 127.f), -127.f)));
        }
        if (__any_sync(0xffffffffu, nan)) scale = 0x7fff;
    }

    // Store it as the row of `position` in the head block at `to`.
    __device__ __forceinline__ void store(unsigned char* to, int position) const {
        store_codes(to + position % kKvBlock * D);
        if (threadIdx.x % 32 == 0)
            reinterpret_cast<unsigned short*>(to + kKvBlock * D)[Q8Kv::scale_index(position)] = scale;
    }
    __device__ __forceinline__ void store(Q8Kv::Row<D>& to) const {
        store_codes(to.elements);
        if (threadIdx.x % 32 == 0) to.scale = scale;
    }

private:
    static constexpr float kLimit = 65024.f;  // 127·512: the decoded values are finite in f16

    __device__ __forceinline__ void store_codes(unsigned char* row) const {
#pragma unroll
        for (int i = 0; i < D / 32; ++i) row[threadIdx.x % 32 + 32 * i] = codes[i];
    }
};

// Copy a warp's row of `position` in the head block at `from`, which an earlier kernel has written.
template <int D>
__device__ __forceinline__ void copy_row(Q8Kv::Row<D>& to, const unsigned char* from, int position) {
#pragma unroll
    for (int i = threadIdx.x % 32; i < D / 4; i += 32)
        reinterpret_cast<unsigned int*>(to.elements)[i] =
            __ldcg(reinterpret_cast<const unsigned int*>(from + position % kKvBlock * D) + i);
    if (threadIdx.x % 32 == 0)
        to.scale = __ldcg(reinterpret_cast<const unsigned short*>(from + kKvBlock * D) + Q8Kv::scale_index(position));
}
