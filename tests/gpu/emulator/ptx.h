// PTX, as far as this project's kernels use it: a function an instruction, operands in the order of the statement.
//
// PTX ISA, "Instruction Set". compiler.py makes these calls out of the kernels' asm statements. Asynchronous copies
// happen at once, so a missing wait stays unseen. The tensor cores' sum is exact to f64 and rounded once, a little better
// than any card's. An address of shared memory is its distance to the memory that is asked for at launch.
#pragma once
#include <immintrin.h>

#include "cuda.h"

inline size_t __cvta_generic_to_shared(const void* at) {
    const ptrdiff_t offset = (const char*)at - emu::dynamic_shared;
    if (offset != (int)offset) std::abort();  // a kernel's library was loaded too far away for 32 bits
    return (size_t)offset;
}
inline char* ptx_shared(unsigned offset) {
    if (offset % 16) __builtin_trap();  // all who ask for it move 16 bytes
    return emu::dynamic_shared + (int)offset;
}

// ---- halves

inline float ptx_value(unsigned half) { return (float)__builtin_bit_cast(_Float16, (unsigned short)half); }
template <class T>
unsigned ptx_half(T v) {
    return __builtin_bit_cast(unsigned short, (_Float16)v);
}
inline float ptx_lower(unsigned pair) { return ptx_value(pair & 0xffff); }
inline float ptx_upper(unsigned pair) { return ptx_value(pair >> 16); }
template <class T>
unsigned ptx_pair(T lower, T upper) {
    return ptx_half(lower) | ptx_half(upper) << 16;
}

inline void ptx_cvt_f32_f16(float& f, unsigned short half) { f = ptx_value(half); }
inline void ptx_cvt_f16_f32(unsigned short& half, float f) { half = (unsigned short)ptx_half(f); }
inline void ptx_cvt_f32x2_f16x2(float& lower, float& upper, unsigned pair) {
    lower = ptx_lower(pair), upper = ptx_upper(pair);
}
inline void ptx_cvt_f16x2_f32(unsigned& pair, float upper, float lower) { pair = ptx_pair(lower, upper); }
inline void ptx_sub_f16x2(unsigned& r, unsigned a, unsigned b) {
    r = ptx_pair(ptx_lower(a) - ptx_lower(b), ptx_upper(a) - ptx_upper(b));
}
inline void ptx_mul_f16x2(unsigned& r, unsigned a, unsigned b) {
    r = ptx_pair(ptx_lower(a) * ptx_lower(b), ptx_upper(a) * ptx_upper(b));
}
inline void ptx_fma_f16x2(unsigned& r, unsigned a, unsigned b, unsigned c) {
    r = ptx_pair((double)ptx_lower(a) * ptx_lower(b) + ptx_lower(c), (double)ptx_upper(a) * ptx_upper(b) + ptx_upper(c));
}

// ---- bytes and memory

inline void ptx_prmt(unsigned& r, unsigned a, unsigned b, unsigned selector) { r = __byte_perm(a, b, selector & 0xffff); }

inline void ptx_atom_inc(unsigned& before, unsigned* at, unsigned last) { before = atomicInc(at, last); }
inline void ptx_ld_acquire(unsigned& v, const unsigned* from) {
    emu::poll();
    v = *from;
}
inline void ptx_red_release(unsigned* to, unsigned v) { *to += v; }

template <class... A>
void ptx_nothing(A...) {}

inline void ptx_cp_async_16(unsigned to, const void* from, int size) {
    std::memset(ptx_shared(to), 0, 16);
    if ((size_t)from % 16) __builtin_trap();
    if (size) std::memcpy(ptx_shared(to), from, size);
}

template <bool TRANSPOSED>
void ptx_ldmatrix(unsigned& r0, unsigned& r1, unsigned& r2, unsigned& r3, unsigned row) {
    const emu::Post* rows = emu::exchange(row);
    unsigned* const out[4] = {&r0, &r1, &r2, &r3};
    const int group = emu::lane() / 4, pair = emu::lane() % 4 * 2;
    for (int matrix = 0; matrix < 4; ++matrix) {
        unsigned short halves[2];
        for (int e = 0; e < 2; ++e) {
            const int i = TRANSPOSED ? pair + e : group, j = TRANSPOSED ? group : pair + e;
            std::memcpy(&halves[e], ptx_shared(emu::from<unsigned>(rows, 8 * matrix + i)) + 2 * j, 2);
        }
        *out[matrix] = halves[0] | (unsigned)halves[1] << 16;
    }
}

// ---- barriers and copies of sm_90

// A barrier of shared memory: a phase ends with its last arrival and the last of its bytes.
struct Barrier {
    unsigned short expected, pending, phase;
    short chunks;  // of 16 bytes, that are still to be copied
};
inline Barrier& ptx_barrier(unsigned at) { return *(Barrier*)(emu::dynamic_shared + (int)at); }
inline void ptx_update(unsigned at, int arrivals, int bytes) {
    Barrier& barrier = ptx_barrier(at);
    barrier.pending -= arrivals, barrier.chunks += bytes / 16;
    if (barrier.pending == 0 && barrier.chunks == 0) barrier.pending = barrier.expected, ++barrier.phase;
}
inline void ptx_mbarrier_init(unsigned at, int arrivals) {
    ptx_barrier(at) = {(unsigned short)arrivals, (unsigned short)arrivals, 0, 0};
}
inline void ptx_mbarrier_expect(unsigned at, int bytes) { ptx_update(at, 1, bytes); }
inline void ptx_mbarrier_arrive(unsigned at, int arrivals) { ptx_update(at, arrivals, 0); }
inline void ptx_mbarrier_try_wait(unsigned& complete, unsigned at, int parity) {
    complete = ptx_barrier(at).phase % 2 != parity;
    if (!complete) emu::yield();
}
inline void ptx_rcp(float& r, float x) { r = 1.f / x; }
inline void ptx_bar_sync(int barrier, int threads) { emu::named_barrier(barrier, threads); }
inline void ptx_st_shared_u32(unsigned to, unsigned value) { std::memcpy(emu::dynamic_shared + (int)to, &value, 4); }

// Address with the swizzle of rows of 128 or 64 bytes: 16-byte chunks, exclusive or with the row or half of it.
inline char* ptx_swizzled(unsigned at, int row_bytes) {
    return emu::dynamic_shared + (int)(at ^ (at >> 7 & (row_bytes == 128 ? 7 : 3)) << 4);
}

// A box of a matrix of f16; elements beyond the matrix are zeros. `map` as host_cupy.py encodes it.
inline void ptx_copy_box(unsigned to, const void* map, int column, int row, unsigned barrier) {
    const unsigned long long* m = (const unsigned long long*)map;
    const unsigned short* const from = (const unsigned short*)m[0];
    const int cols = (int)m[1], rows = (int)m[2], box_cols = (int)m[3], box_rows = (int)m[4];
    if (to % 1024) __builtin_trap();
    for (int i = 0; i < box_rows * box_cols; ++i) {
        const int r = row + i / box_cols, c = column + i % box_cols;
        const unsigned short value = r < rows && c < cols ? from[(size_t)r * cols + c] : 0;
        std::memcpy(ptx_swizzled(to + 2 * i, 2 * box_cols), &value, 2);
    }
    ptx_update(barrier, 0, -2 * box_rows * box_cols);
}

// ---- tensor cores

struct Fragments {
    unsigned a[4], b[2];
};

// "Matrix fragments for mma.m16n8k16": which lane holds which element of A, B and the sum.
inline void ptx_mma_m16n8k16(float& c0, float& c1, float& c2, float& c3, unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                             unsigned b0, unsigned b1) {
    const emu::Post* posts = emu::exchange(Fragments{{a0, a1, a2, a3}, {b0, b1}});
    const int group = emu::lane() / 4, pair = emu::lane() % 4 * 2;
    float* const out[4] = {&c0, &c1, &c2, &c3};
    for (int e = 0; e < 4; ++e) {
        double sum = *out[e];
        for (int k = 0; k < 16; k += 2) {
            const unsigned a = emu::from<Fragments>(posts, 4 * group + k % 8 / 2).a[e / 2 + 2 * (k / 8)];
            const unsigned b = emu::from<Fragments>(posts, 4 * (pair + e % 2) + k % 8 / 2).b[k / 8];
            sum += (double)ptx_lower(a) * ptx_lower(b) + (double)ptx_upper(a) * ptx_upper(b);
        }
        *out[e] = (float)sum;
    }
}

// "Matrix fragments for mma.m16n8k32" and "mma.m16n8k16" with .s8: WORDS words of B, twice as many of A. Sums start at
// `c`.
template <int WORDS>
void ptx_mma_s8(int* const (&out)[4], const Fragments& own, const int (&c)[4]) {
    const emu::Post* posts = emu::exchange(own);
    const int group = emu::lane() / 4, pair = emu::lane() % 4 * 2;
    for (int e = 0; e < 4; ++e) {
        int sum = c[e];
        for (int k = 0; k < 4 * WORDS; ++k) {
            const unsigned a = emu::from<Fragments>(posts, 4 * group + k % 4).a[e / 2 + 2 * (k / 4)];
            const unsigned b = emu::from<Fragments>(posts, 4 * (pair + e % 2) + k % 4).b[k / 4];
            sum = __dp4a((int)a, (int)b, sum);
        }
        *out[e] = sum;
    }
}
inline void ptx_mma_m16n8k32_s8(int& d0, int& d1, int& d2, int& d3, unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                unsigned b0, unsigned b1, int c0, int c1, int c2, int c3) {
    ptx_mma_s8<2>({&d0, &d1, &d2, &d3}, Fragments{{a0, a1, a2, a3}, {b0, b1}}, {c0, c1, c2, c3});
}
inline void ptx_mma_m16n8k16_s8(int& d0, int& d1, int& d2, int& d3, unsigned a0, unsigned a1, unsigned b, int c0, int c1,
                                int c2, int c3) {
    ptx_mma_s8<1>({&d0, &d1, &d2, &d3}, Fragments{{a0, a1, 0, 0}, {b, 0}}, {c0, c1, c2, c3});
}
