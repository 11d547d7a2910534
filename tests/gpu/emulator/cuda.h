// CUDA C++'s names, as far as this project's kernels use them: types, qualifiers, barriers, shuffles and intrinsics.
//
// CUDA C++ Programming Guide, "C/C++ Language Extensions"; CUDA Math API, "Integer", "Single and Double Precision
// Intrinsics". Vector types have CUDA's alignment, and -fsanitize=alignment stops at an access that breaks it. Masks of
// lanes are ignored: an exchange is always the whole warp's. The device is an sm_80, but for kernels with wgmma. Next: ptx.h.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __builtin_assume(condition)
#define __restrict__
#define __grid_constant__
#define __shared__ static __attribute__((section("shared_memory")))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define threadIdx (emu::current->index)
#define blockIdx (emu::block_index)
#define blockDim (emu::block_size)
#define gridDim (emu::grid_size)

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- threads together

inline void __syncthreads() { emu::block_barrier(); }
inline void __syncwarp(unsigned = ~0u) { emu::warp_barrier(); }
inline void __threadfence() {}

template <class T>
T __shfl_sync(unsigned, T v, int lane) {
    return emu::from<T>(emu::exchange(v), lane % emu::kWarp);
}
template <class T>
T __shfl_xor_sync(unsigned, T v, int mask) {
    return emu::from<T>(emu::exchange(v), emu::lane() ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T v, int n) {
    const int lane = emu::lane();
    return emu::from<T>(emu::exchange(v), lane >= n ? lane - n : lane);
}
template <class T>
T __shfl_down_sync(unsigned, T v, int n) {
    const int lane = emu::lane();
    return emu::from<T>(emu::exchange(v), lane + n < emu::kWarp ? lane + n : lane);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
    const emu::Post* posts = emu::exchange(predicate);
    unsigned bits = 0;
    for (int lane = 0; lane < emu::kWarp; ++lane) bits |= (unsigned)(emu::from<int>(posts, lane) != 0) << lane;
    return bits;
}
template <class T>
unsigned __match_any_sync(unsigned, T v) {
    const emu::Post* posts = emu::exchange(v);
    const T own = emu::from<T>(posts, emu::lane());
    unsigned bits = 0;
    for (int lane = 0; lane < emu::kWarp; ++lane) bits |= (unsigned)(emu::from<T>(posts, lane) == own) << lane;
    return bits;
}
inline unsigned __reduce_max_sync(unsigned, unsigned v) {
    const emu::Post* posts = emu::exchange(v);
    unsigned best = 0;
    for (int lane = 0; lane < emu::kWarp; ++lane) best = std::max(best, emu::from<unsigned>(posts, lane));
    return best;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == ~0u; }

template <class T>
T atomicAdd(T* at, T v) {
    const T old = *at;
    *at += v;
    return old;
}
template <class T>
T atomicMax(T* at, T v) {
    const T old = *at;
    if (v > old) *at = v;
    return old;
}
template <class T>
T atomicExch(T* at, T v) {
    const T old = *at;
    *at = v;
    return old;
}
inline unsigned atomicInc(unsigned* at, unsigned most) {
    const unsigned old = *at;
    *at = old >= most ? 0 : old + 1;
    return old;
}

// ---- arithmetic; compiled with -ffp-contract=off, so what is no fma is rounded after each operation

template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
    using C = std::common_type_t<A, B>;
    return (C)a > (C)b ? (C)a : (C)b;
}
template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
    using C = std::common_type_t<A, B>;
    return (C)a < (C)b ? (C)a : (C)b;
}
inline unsigned __float_as_uint(float v) { return __builtin_bit_cast(unsigned, v); }
inline int __float_as_int(float v) { return __builtin_bit_cast(int, v); }
inline float __uint_as_float(unsigned v) { return __builtin_bit_cast(float, v); }
inline float __int_as_float(int v) { return __builtin_bit_cast(float, v); }
inline long long __double_as_longlong(double v) { return __builtin_bit_cast(long long, v); }
inline double __longlong_as_double(long long v) { return __builtin_bit_cast(double, v); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline int __float2int_rn(float v) { return (int)std::lrintf(v); }
inline long long __double2ll_rn(double v) { return std::llrint(v); }
inline float rsqrtf(float v) { return 1.f / std::sqrt(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clzll(long long v) { return v ? __builtin_clzll((unsigned long long)v) : 64; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 4; ++i) sum += (int)(signed char)(a >> 8 * i) * (int)(signed char)(b >> 8 * i);
    return sum;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const unsigned long long all = (unsigned long long)b << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned pick = selector >> 4 * i & 15, byte = (unsigned)(all >> 8 * (pick & 7)) & 255;
        result |= (pick & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
    }
    return result;
}
template <class T>
T __ldg(const T* at) {
    return *at;
}
template <class T>
T __ldcs(const T* at) {
    return *at;
}
template <class T>
T __ldcg(const T* at) {
    return *at;
}
