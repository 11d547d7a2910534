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
// the MMAs, the compiler serializes them. After a wait: keep reads of the sums behind it.
__device__ __forceinline__ void settle(unsigned int (&a)[4]) {
    asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory");
}
__device__ __forceinline__ void settle(float (&c)[4]) {
    asm volatile("" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])::"memory");
}
template <class T, int N>
__device__ __forceinline__ void settle(T (&fragments)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n) settle(fragments[n]);
}

// End a group of MMAs.
__device__ __forceinline__ void commit_mmas() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most the newest PENDING groups are incomplete.
template <int PENDING>
__device__ __forceinline__ void wait_for_mmas() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Descriptor of B, or of A, in shared memory: rows of ROW_BYTES, 128 or 64, as a tensor map with
// SWIZZLE_128B or SWIZZLE_64B writes them: 16-byte chunk c of row r stored at c ^ (r & 7), or at
// c ^ (r / 2 & 3). K-major: rows are those of N, `at` is a multiple of 8·ROW_BYTES, plus 32 for
// each 16 columns of k. N-major: rows are those of k, columns beyond a row continue `next_panel`
// bytes later.
template <int ROW_BYTES = 128>
__device__ __forceinline__ unsigned long long descriptor(unsigned int at, unsigned int next_panel = 16) {
    static_assert(ROW_BYTES == 128 || ROW_BYTES == 64, "swizzle");
    constexpr unsigned long long swizzle = 128 / ROW_BYTES, row_groups = 8ull * ROW_BYTES >> 4;
    return swizzle << 62 | row_groups << 32 | (unsigned long long)(next_panel >> 4) << 16 | (at & 0x3ffff) >> 4;
}

// The descriptor `bytes` later in shared memory.
__device__ __forceinline__ unsigned long long advanced(unsigned long long descriptor, int bytes) {
    return descriptor + (bytes >> 4);
}

// Change the number of registers of each thread of this warpgroup; the compiler fits its code to
// it.
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
#define WGMMA(N, SUMS, A, B, ADD, FLAGS, ...)                                                    \
    asm volatile("{ .reg .pred p; setp.ne.u32 p, " ADD ", 0; wgmma.mma_async.sync.aligned.m64n" #N \
                 "k16.f32.f16.f16 {" SUMS "}, " A ", " B ", p, 1, 1, " FLAGS "; }"                 \
                 : __VA_ARGS__)
#define A_REGISTERS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ADD), "n"(N_MAJOR)
#define A_SHARED "l"(a), "l"(b), "n"(ADD)

// c += a·b, or c = a·b without ADD, of N/8 fragments of 8 columns, with A in registers.
template <bool ADD = true, bool N_MAJOR = false, int FRAGS_N>
__device__ __forceinline__ void mma_64xNx16(float (&c)[FRAGS_N][4], const unsigned int (&a)[4], unsigned long long b) {
    static_assert(FRAGS_N == 2 || FRAGS_N % 4 == 0 && FRAGS_N <= 24 || FRAGS_N == 32, "N");
    if constexpr (FRAGS_N == 2) WGMMA(16, S_16, "{%8,%9,%10,%11}", "%12", "%13", "%14", C_16(0) : A_REGISTERS);
    if constexpr (FRAGS_N == 4) WGMMA(32, S_32, "{%16,%17,%18,%19}", "%20", "%21", "%22", C_32(0) : A_REGISTERS);
    if constexpr (FRAGS_N == 8) WGMMA(64, S_64, "{%32,%33,%34,%35}", "%36", "%37", "%38", C_64(0) : A_REGISTERS);
    if constexpr (FRAGS_N == 12)
        WGMMA(96, S_96, "{%48,%49,%50,%51}", "%52", "%53", "%54", C_64(0), C_32(8) : A_REGISTERS);
    if constexpr (FRAGS_N == 16) WGMMA(128, S_128, "{%64,%65,%66,%67}", "%68", "%69", "%70", C_128(0) : A_REGISTERS);
    if constexpr (FRAGS_N == 20)
        WGMMA(160, S_160, "{%80,%81,%82,%83}", "%84", "%85", "%86", C_128(0), C_32(16) : A_REGISTERS);
    if constexpr (FRAGS_N == 24)
        WGMMA(192, S_192, "{%96,%97,%98,%99}", "%100", "%101", "%102", C_128(0), C_64(16) : A_REGISTERS);
    if constexpr (FRAGS_N == 32)
        WGMMA(256, S_256, "{%128,%129,%130,%131}", "%132", "%133", "%134", C_128(0), C_128(16) : A_REGISTERS);
}

// The same with A in shared memory, 64 rows as `descriptor` describes them; A and B are K-major.
template <bool ADD = true, int FRAGS_N>
__device__ __forceinline__ void mma_64xNx16(float (&c)[FRAGS_N][4], unsigned long long a, unsigned long long b) {
    static_assert(FRAGS_N == 2 || FRAGS_N == 4 || FRAGS_N == 8 || FRAGS_N == 16, "N");
    if constexpr (FRAGS_N == 2) WGMMA(16, S_16, "%8", "%9", "%10", "0, 0", C_16(0) : A_SHARED);
    if constexpr (FRAGS_N == 4) WGMMA(32, S_32, "%16", "%17", "%18", "0, 0", C_32(0) : A_SHARED);
    if constexpr (FRAGS_N == 8) WGMMA(64, S_64, "%32", "%33", "%34", "0, 0", C_64(0) : A_SHARED);
    if constexpr (FRAGS_N == 16) WGMMA(128, S_128, "%64", "%65", "%66", "0, 0", C_128(0) : A_SHARED);
}
