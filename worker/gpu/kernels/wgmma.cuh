// Tensor-core MMA of a warpgroup, m64nNk16 (f16 operands, f32 accumulation), in PTX (sm_90a).
//
// PTX ISA, "Asynchronous warpgroup level matrix instructions". Warp w of the warpgroup holds rows
// 16w to 16w + 15 of A and of the sum, each as a fragment of mma.cuh; B is in shared memory. The
// instruction runs asynchronously: its registers must not be touched before `wait_for_mmas`. A
// result depends on its own row of A and column of B only.
#pragma once

// Order register accesses before the next MMAs of this warpgroup.
__device__ __forceinline__ void begin_mmas() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Keep the computation of registers of A, or of sums, before this point: where it is moved between
// the MMAs, the compiler serializes them.
__device__ __forceinline__ void settle(unsigned int (&a)[4]) {
    asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory");
}
__device__ __forceinline__ void settle(float (&c)[4]) {
    asm volatile("" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])::"memory");
}

// End a group of MMAs.
__device__ __forceinline__ void commit_mmas() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most the newest PENDING groups are incomplete.
template <int PENDING>
__device__ __forceinline__ void wait_for_mmas() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Descriptor of B, or of A, in shared memory: rows of 64 f16 (128 bytes), 16-byte chunk c of row r
// stored at c ^ (r & 7), as a tensor map with SWIZZLE_128B writes them. `at` is a multiple of 1,024,
// plus 32 for each 16 columns of k.
__device__ __forceinline__ unsigned long long descriptor(unsigned int at) {
    constexpr unsigned long long swizzle_128 = 1ull << 62, row_groups = 1024ull >> 4 << 32, unused = 1ull << 16;
    return swizzle_128 | row_groups | unused | (at & 0x3ffff) >> 4;
}

// Change the number of registers of each thread of this warpgroup; the compiler fits its code to it.
template <int REGISTERS>
__device__ __forceinline__ void lower_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void raise_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

#define C_8(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define C_16(j) C_8(j), C_8(j + 1)
#define C_32(j) C_16(j), C_16(j + 2)
#define C_64(j) C_32(j), C_32(j + 4)
#define C_128(j) C_64(j), C_64(j + 8)
#define S_16 "%0,%1,%2,%3,%4,%5,%6,%7"
#define S_32 S_16 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define S_64 S_32 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define S_96 S_64 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define S_128                                                                                     \
    S_64 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52"    \
         ",%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define S_160 S_128 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define S_192                                                                                     \
    S_128 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84"   \
          ",%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define S_256                                                                                     \
    S_192 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112"      \
          ",%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define WGMMA(N, SUMS, A, B, ...)                                                                \
    asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n" #N      \
                 "k16.f32.f16.f16 {" SUMS "}, " A ", " B "; }"                                    \
                 : __VA_ARGS__)
#define A_REGISTERS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
#define FLAGS ", p, 1, 1, 0"         // accumulate, do not negate A or B, B is K-major
#define FLAGS_SHARED ", p, 1, 1, 0, 0"  // and so is A

// c += a·b of N/8 fragments of 8 columns, with A in registers.
template <int FRAGS_N>
__device__ __forceinline__ void mma_64xNx16(float (&c)[FRAGS_N][4], const unsigned int (&a)[4], unsigned long long b) {
    static_assert(FRAGS_N == 2 || FRAGS_N % 4 == 0 && FRAGS_N <= 24 || FRAGS_N == 32, "N");
    if constexpr (FRAGS_N == 2) WGMMA(16, S_16, "{%8,%9,%10,%11}", "%12" FLAGS, C_16(0) : A_REGISTERS);
    if constexpr (FRAGS_N == 4) WGMMA(32, S_32, "{%16,%17,%18,%19}", "%20" FLAGS, C_32(0) : A_REGISTERS);
    if constexpr (FRAGS_N == 8) WGMMA(64, S_64, "{%32,%33,%34,%35}", "%36" FLAGS, C_64(0) : A_REGISTERS);
    if constexpr (FRAGS_N == 12) WGMMA(96, S_96, "{%48,%49,%50,%51}", "%52" FLAGS, C_64(0), C_32(8) : A_REGISTERS);
    if constexpr (FRAGS_N == 16) WGMMA(128, S_128, "{%64,%65,%66,%67}", "%68" FLAGS, C_128(0) : A_REGISTERS);
    if constexpr (FRAGS_N == 20) WGMMA(160, S_160, "{%80,%81,%82,%83}", "%84" FLAGS, C_128(0), C_32(16) : A_REGISTERS);
    if constexpr (FRAGS_N == 24) WGMMA(192, S_192, "{%96,%97,%98,%99}", "%100" FLAGS, C_128(0), C_64(16) : A_REGISTERS);
    if constexpr (FRAGS_N == 32)
        WGMMA(256, S_256, "{%128,%129,%130,%131}", "%132" FLAGS, C_128(0), C_128(16) : A_REGISTERS);
}

// The same with A in shared memory, 64 rows as `descriptor` describes them.
template <int FRAGS_N>
__device__ __forceinline__ void mma_64xNx16(float (&c)[FRAGS_N][4], unsigned long long a, unsigned long long b) {
    static_assert(FRAGS_N == 2 || FRAGS_N == 4 || FRAGS_N == 8 || FRAGS_N == 16, "N");
    if constexpr (FRAGS_N == 2) WGMMA(16, S_16, "%8", "%9" FLAGS_SHARED, C_16(0) : "l"(a), "l"(b));
    if constexpr (FRAGS_N == 4) WGMMA(32, S_32, "%16", "%17" FLAGS_SHARED, C_32(0) : "l"(a), "l"(b));
    if constexpr (FRAGS_N == 8) WGMMA(64, S_64, "%32", "%33" FLAGS_SHARED, C_64(0) : "l"(a), "l"(b));
    if constexpr (FRAGS_N == 16) WGMMA(128, S_128, "%64", "%65" FLAGS_SHARED, C_128(0) : "l"(a), "l"(b));
}
