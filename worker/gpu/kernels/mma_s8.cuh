// Tensor-core MMA of 8-bit integers in PTX: exact i32 sums, stored as floats without a conversion.
//
// PTX ISA, "Matrix fragments for mma.m16n8k32" and "mma.m16n8k16" (.s8): of A lane l holds bytes
// 4·(l%4) to 4·(l%4)+3 of rows l/4 (a0, a2) and l/4 + 8 (a1, a3), of B the same bytes of column l/4
// (b0, b1); a2, a3 and b1 are the bytes from 16 on. These are the matrices of `load_matrices` for
// rows of 16 bytes. The accumulator is that of mma.cuh.
// The accumulator starts at the bits of the float kIntBias = 1.5·2²³, so that its bits are those of
// the float kIntBias + sum, exactly, for |sum| < 2²²; a sum of 32 products is below 2²⁰. The four
// words of the start are loaded (`IntBias`), from an address that differs between lanes: the
// compiler would move a constant or a uniform value to registers again for every MMA.
#pragma once
#include "mma.cuh"

constexpr float kIntBias = 12582912.f;
constexpr int kIntBiasBits = 0x4B400000;

// The start of accumulators in shared memory. A barrier must follow `store`.
struct IntBias {
    int4 copies[2];
    __device__ __forceinline__ void store() {
        copies[threadIdx.x % 2] = make_int4(kIntBiasBits, kIntBiasBits, kIntBiasBits, kIntBiasBits);
    }
    __device__ __forceinline__ int4 load() const {
        const volatile int* const from = reinterpret_cast<const volatile int*>(&copies[threadIdx.x % 2]);
        return make_int4(from[0], from[1], from[2], from[3]);
    }
};

// c = bias + a·b over 32 bytes.
__device__ __forceinline__ void mma_16x8x32_s8(float (&c)[4], const unsigned int (&a)[4], unsigned int b0, unsigned int b1,
                                               const int4& bias) {
    int d[4];
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(bias.x), "r"(bias.y), "r"(bias.z), "r"(bias.w));
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] = __int_as_float(d[i]);
}

// The same over 16 bytes: a0, a1 and b0, or a2, a3 and b1.
__device__ __forceinline__ void mma_16x8x16_s8(float (&c)[4], unsigned int a0, unsigned int a1, unsigned int b, const int4& bias) {
    int d[4];
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a0), "r"(a1), "r"(b), "r"(bias.x), "r"(bias.y), "r"(bias.z), "r"(bias.w));
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] = __int_as_float(d[i]);
}
