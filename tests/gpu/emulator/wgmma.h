// kernels/wgmma.cuh for fibers: an MMA runs when it is issued, for the rows of the calling warp.
//
// Waits do nothing, so a missing one stays unseen, as does a register that changes too early. Operands
// in shared memory are read with their swizzle by address, as the hardware does.
inline void begin_mmas() {}
template <class T>
void settle(T&) {}
inline void commit_mmas() {}
template <int PENDING>
void wait_for_mmas() {}
template <int REGISTERS>
void lower_registers() {}
template <int REGISTERS>
void raise_registers() {}

// Bits 0 to 31: the address; from 32 on: next_panel, and 1 for rows of 64 bytes.
template <int ROW_BYTES = 128>
unsigned long long descriptor(unsigned at, unsigned next_panel = 16) {
    return at | (unsigned long long)(next_panel | (ROW_BYTES == 64)) << 32;
}

inline unsigned long long advanced(unsigned long long descriptor, int bytes) { return descriptor + bytes; }

// The 16 elements of k of row r of an operand.
inline void load_row(unsigned long long descriptor, bool n_major, int r, float (&row)[16]) {
    const int next_panel = (int)(descriptor >> 32 & ~1u), row_bytes = descriptor >> 32 & 1 ? 64 : 128;
    for (int k = 0; k < 16; ++k) {
        const int column = n_major ? r % (row_bytes / 2) : k, line = n_major ? k : r;
        const int panel = n_major ? r / (row_bytes / 2) * next_panel : 0;
        row[k] = ptx_value(*(const unsigned short*)ptx_swizzled((unsigned)descriptor + panel + line * row_bytes + 2 * column, row_bytes));
    }
}

template <bool ADD, bool N_MAJOR, int FRAGS_N>
void multiply_rows(float (&c)[FRAGS_N][4], const float (&a)[2][16], unsigned long long b) {
    for (int n = 0; n < 2 * FRAGS_N; ++n) {
        float row[16];
        load_row(b, N_MAJOR, n / 2 * 8 + emu::lane() % 4 * 2 + n % 2, row);
        for (int i = 0; i < 2; ++i) {
            double sum = ADD ? c[n / 2][2 * i + n % 2] : 0;
            for (int k = 0; k < 16; ++k) sum += (double)a[i][k] * row[k];
            c[n / 2][2 * i + n % 2] = (float)sum;
        }
    }
}

template <bool ADD = true, bool N_MAJOR = false, int FRAGS_N>
void mma_64xNx16(float (&c)[FRAGS_N][4], const unsigned (&a)[4], unsigned long long b) {
    const emu::Post* posts = emu::exchange(Fragments{{a[0], a[1], a[2], a[3]}, {}});
    float rows[2][16];
    for (int i = 0; i < 2; ++i)
        for (int k = 0; k < 16; k += 2) {
            const int quad = emu::lane() / 4 * 4;
            const unsigned pair = emu::from<Fragments>(posts, quad + k % 8 / 2).a[i + k / 8 * 2];
            rows[i][k] = ptx_lower(pair), rows[i][k + 1] = ptx_upper(pair);
        }
    multiply_rows<ADD, N_MAJOR>(c, rows, b);
}

template <bool ADD = true, int FRAGS_N>
void mma_64xNx16(float (&c)[FRAGS_N][4], unsigned long long a, unsigned long long b) {
    float rows[2][16];
    for (int i = 0; i < 2; ++i) load_row(a, false, threadIdx.x / 32 % 4 * 16 + emu::lane() / 4 + 8 * i, rows[i]);
    multiply_rows<ADD, false>(c, rows, b);
}
