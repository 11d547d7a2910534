// Tensor-core MMA m16n8k16 (f16 operands, f32 accumulation), `ldmatrix` and `cp.async` in PTX.
//
// PTX ISA, "Matrix fragments for mma.m16n8k16": of a 16×8 accumulator a lane holds rows lane/4 and
// lane/4 + 8, columns 2·(lane%4) and the next: {c0, c1 | c2, c3}. Row r of the result depends on
// row r of A and all of B, in a fixed order.
#pragma once

__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const unsigned int (&a)[4], unsigned int b0, unsigned int b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Load four 8×8 matrices of f16: lane l passes the address of the 16-byte row l%8 of matrix l/8, in
// shared memory (as an address of that space or a generic one); matrix i goes to r[i].
__device__ __forceinline__ void load_matrices(unsigned int (&r)[4], unsigned int row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

__device__ __forceinline__ void load_matrices(unsigned int (&r)[4], const void* row) {
    load_matrices(r, (unsigned int)__cvta_generic_to_shared(row));
}

__device__ __forceinline__ void load_matrices_transposed(unsigned int (&r)[4], const void* row) {
    const unsigned int at = (unsigned int)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

// Copy 16 bytes from global to shared memory asynchronously; write zeros when `valid` is false.
__device__ __forceinline__ void copy_16_async(unsigned int to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

__device__ __forceinline__ void copy_16_async(void* to, const void* from, bool valid) {
    copy_16_async((unsigned int)__cvta_generic_to_shared(to), from, valid);
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most the newest PENDING groups of this thread are pending. A barrier must follow.
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
