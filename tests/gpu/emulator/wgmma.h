// kernels/wgmma.cuh for fibers: an MMA runs when it is issued, for the rows of the calling warp.
//
// Waits do nothing, so a missing one stays unseen, as does a register that changes too early. Operands
// in shared memory are read with the swizzle of 128 bytes by address, as the hardware does.
inline void begin_mmas() {}
template <class T>
void settle(T (&)[4]) {}
inline void commit_mmas() {}
template <int PENDING>
void wait_for_mmas() {}
template <int REGISTERS>
void lower_registers() {}
template <int REGISTERS>
void raise_registers() {}

inline unsigned long long descriptor(unsigned at) { return at; }

// The 16 elements of row r of an operand.
inline void load_row(unsigned long long descriptor, int r, float (&row)[16]) {
    for (int half = 0; half < 2; ++half) {
        const __m128i* chunk = (const __m128i*)ptx_swizzled((unsigned)descriptor + r * 128 + 16 * half);
        _mm256_storeu_ps(row + 8 * half, _mm256_cvtph_ps(_mm_load_si128(chunk)));
    }
}

template <int FRAGS_N>
void multiply_rows(float (&c)[FRAGS_N][4], const float (&a)[2][16], unsigned long long b) {
    for (int n = 0; n < 2 * FRAGS_N; ++n) {
        float row[16];
        load_row(b, n / 2 * 8 + emu::lane() % 4 * 2 + n % 2, row);
        for (int i = 0; i < 2; ++i) {
            double sum = c[n / 2][2 * i + n % 2];
            for (int k = 0; k < 16; ++k) sum += (double)a[i][k] * row[k];
            c[n / 2][2 * i + n % 2] = (float)sum;
        }
    }
}

template <int FRAGS_N>
void mma_64xNx16(float (&c)[FRAGS_N][4], const unsigned (&a)[4], unsigned long long b) {
    const emu::Post* posts = emu::exchange(Fragments{{a[0], a[1], a[2], a[3]}, {}});
    float rows[2][16];
    for (int i = 0; i < 2; ++i)
        for (int k = 0; k < 16; k += 2) {
            const int quad = emu::lane() / 4 * 4;
            const unsigned pair = emu::from<Fragments>(posts, quad + k % 8 / 2).a[i + k / 8 * 2];
            rows[i][k] = ptx_lower(pair), rows[i][k + 1] = ptx_upper(pair);
        }
    multiply_rows(c, rows, b);
}

template <int FRAGS_N>
void mma_64xNx16(float (&c)[FRAGS_N][4], unsigned long long a, unsigned long long b) {
    float rows[2][16];
    for (int i = 0; i < 2; ++i) load_row(a, threadIdx.x / 32 % 4 * 16 + emu::lane() / 4 + 8 * i, rows[i]);
    multiply_rows(c, rows, b);
}
