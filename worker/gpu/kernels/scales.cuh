// Quantization scales in planes: `scales` holds those of one unit of 32 elements, `supers` those
// shared by 8 units.
//
// Each struct holds what `load` reads for unit u of a matrix; `unpack(u)` converts it to f32,
// rounded as in gguf.quants. Writer: repack.cu. Users: formats.cuh. Sizes: worker/gpu/layouts.py.
#pragma once
#include "codes.cuh"
#include "half.cuh"

// Scale and minimum of elements 0–15 and of 16–31.
struct Scales {
    float scale[2], min[2];
};

struct F16Scale {
    u16 d;
    __device__ void load(const Planes& p, u32 u) { d = load_plane<u16>(p.scales, u); }
    __device__ Scales unpack(u32) const {
        const float s = half_to_float(d);
        return {{s, s}, {0, 0}};
    }
};

struct F16ScaleMin {
    u32 dm;
    __device__ void load(const Planes& p, u32 u) { dm = load_plane<u32>(p.scales, u); }
    __device__ Scales unpack(u32) const {
        const float2 s = half2_to_float2(dm);
        return {{s.x, s.x}, {-s.y, -s.y}};
    }
};

struct E8m0Scale {
    u8 e;
    __device__ void load(const Planes& p, u32 u) { e = load_plane<u8>(p.scales, u); }
    __device__ Scales unpack(u32) const {  // 2^(e-127) / 2, since codes are doubled; a denormal for e < 2
        const float s = __uint_as_float(e < 2 ? 0x00200000u << e : (u32)(e - 1) << 23);
        return {{s, s}, {0, 0}};
    }
};

// Two 6-bit fields of unit u, from 12 bytes for 8 units: nibble u%8 of word 0 holds the low bits of
// the first field, of word 1 those of the second, of word 2 the two high bits of the first (low
// half) and of the second (high half).
__device__ __forceinline__ void unpack_6_bits(u32 w0, u32 w1, u32 w2, u32 u, int& first, int& second) {
    const u32 at = u % 8 * 4, high = w2 >> at;
    first = (w0 >> at & 15) | (high & 3) << 4;
    second = (w1 >> at & 15) | (high & 12) << 2;
}

struct KScaleMin {  // Q4_K, Q5_K: a super is 16 bytes, d and dmin before the 6-bit fields
    uint4 s;
    __device__ void load(const Planes& p, u32 u) { s = load_plane<uint4>(p.supers, u / 8); }
    __device__ Scales unpack(u32 u) const {
        int scale, min;
        unpack_6_bits(s.y, s.z, s.w, u, scale, min);
        const float2 d = half2_to_float2(s.x);
        const float a = __fmul_rn(d.x, (float)scale), b = __fmul_rn(d.y, (float)min);
        return {{a, a}, {b, b}};
    }
};

struct Q3Scales {
    u32 w[3];
    u16 d;
    __device__ void load(const Planes& p, u32 u) {
#pragma unroll
        for (int i = 0; i < 3; ++i) w[i] = load_plane<u32>(p.scales, u / 8 * 3 + i);
        d = load_plane<u16>(p.supers, u / 8);
    }
    __device__ Scales unpack(u32 u) const {
        int a, b;
        unpack_6_bits(w[0], w[1], w[2], u, a, b);
        const float s = half_to_float(d);
        return {{__fmul_rn(s, (float)(a - 32)), __fmul_rn(s, (float)(b - 32))}, {0, 0}};
    }
};

struct Q2Scales {
    u16 s;
    u32 dm;
    __device__ void load(const Planes& p, u32 u) {
        s = load_plane<u16>(p.scales, u);
        dm = load_plane<u32>(p.supers, u / 8);
    }
    __device__ Scales unpack(u32) const {
        const float2 d = half2_to_float2(dm);
        return {{__fmul_rn(d.x, (float)(s & 15)), __fmul_rn(d.x, (float)(s >> 8 & 15))},
                {__fmul_rn(d.y, (float)(s >> 4 & 15)), __fmul_rn(d.y, (float)(s >> 12))}};
    }
};

struct Q6Scales {
    u16 s, d;
    __device__ void load(const Planes& p, u32 u) {
        s = load_plane<u16>(p.scales, u);
        d = load_plane<u16>(p.supers, u / 8);
    }
    __device__ Scales unpack(u32) const {
        const float f = half_to_float(d);
        return {{__fmul_rn(f, (float)(signed char)s), __fmul_rn(f, (float)((short)s >> 8))}, {0, 0}};
    }
};

struct SuperScale {  // TQ2_0
    u16 d;
    __device__ void load(const Planes& p, u32 u) { d = load_plane<u16>(p.supers, u / 8); }
    __device__ Scales unpack(u32) const {
        const float s = half_to_float(d);
        return {{s, s}, {0, 0}};
    }
};

struct Iq4Scales {  // a super is 8 bytes: d, high bits of eight scales, their low bits
    uint2 s;
    __device__ void load(const Planes& p, u32 u) { s = load_plane<uint2>(p.supers, u / 8); }
    __device__ Scales unpack(u32 u) const {
        const int scale = (s.y >> u % 8 * 4 & 15) | (s.x >> (16 + u % 8 * 2) & 3) << 4;
        const float f = __fmul_rn(half_to_float(s.x & 0xffff), (float)(scale - 32));
        return {{f, f}, {0, 0}};
    }
};

template <int DIVISOR>
struct CodebookScales {  // IQ1, IQ2, IQ3: d·(2s + 1) / DIVISOR, a power of two, with 4 bits s for 16 elements
    u8 s;
    u16 d;
    __device__ void load(const Planes& p, u32 u) {
        s = load_plane<u8>(p.scales, u);
        d = load_plane<u16>(p.supers, u / 8);
    }
    __device__ Scales unpack(u32) const {
        const float f = __fmul_rn(half_to_float(d), 1.f / DIVISOR);
        return {{__fmul_rn(f, (float)(2 * (s & 15) + 1)), __fmul_rn(f, (float)(2 * (s >> 4) + 1))}, {0, 0}};
    }
};

struct E4m3Scales {  // NVFP4: half of an unsigned E4M3 for 16 elements, since codes are doubled
    u16 s;
    __device__ void load(const Planes& p, u32 u) { s = load_plane<u16>(p.scales, u); }
    // An E4M3 shifted left by 7 is the f16 of its value · 2^-8, subnormals included.
    __device__ Scales unpack(u32) const {
        const float2 f = half2_to_float2((s & 0x7fu) << 7 | (s & 0x7f00u) << 15);
        return {{__fmul_rn(f.x, 128.f), __fmul_rn(f.y, 128.f)}, {0, 0}};
    }
};
