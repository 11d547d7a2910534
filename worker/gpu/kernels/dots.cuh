// Dot products of weight rows with one token's activations, for decode: a warp walks some rows' units side by side.
//
// Block types meet 8-bit activations (quantized.cuh) in dp4a, the sums of integers exact:
//     Σ (scale·(code - zero) - min)·x = x.scale · (scale·(Σ code·q - zero·Σ q) - min·Σ q)
// f32, f16 and bf16 meet f32 activations in fused multiply-adds. A lane takes units lane, lane + 32, …: ROWS·DEPTH of
// them are in flight together, and a row's first ones before anything that they meet is known. Sums go in a fixed order.
// Twins: `matmul` in worker/cpu/plain.py, and with activations quantized alike worker/cpu/quantized.py.
#pragma once
#include "formats.cuh"
#include "staged.cuh"

template <class Block>
struct Operand {  // a unit of the block types
    int q[8];
    float scale;
    int sums[2];
    __device__ __forceinline__ void load(const Activations& x, u32 u) {
        const uint4* halves = reinterpret_cast<const uint4*>(x.q);
        const uint4 a = halves[u], b = halves[x.cols / 32 + u];
        q[0] = a.x, q[1] = a.y, q[2] = a.z, q[3] = a.w, q[4] = b.x, q[5] = b.y, q[6] = b.z, q[7] = b.w;
        const int2 m = reinterpret_cast<const int2*>(x.meta)[u];
        scale = __int_as_float(m.x), sums[0] = (short)m.y, sums[1] = m.y >> 16;
    }
};

template <class Block>
__device__ __forceinline__ float dot(const Unit<Block>& w, u32 u, const Operand<Block>& x, float sum) {
    using W = Unit<Block>;
    const Codes c = w.bits.codes();
    const Scales k = w.s.scales(u);
    int a = 0, b = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) a = __dp4a(c.w[i], x.q[i], a), b = __dp4a(c.w[i + 4], x.q[i + 4], b);
    a -= W::kZero * x.sums[0], b -= W::kZero * x.sums[1];
    float y = W::kTwoScales ? k.scale[0] * (float)a + k.scale[1] * (float)b : k.scale[0] * (float)(a + b);
    if (W::kHasMin && W::kTwoScales) y -= k.min[0] * (float)x.sums[0] + k.min[1] * (float)x.sums[1];
    if (W::kHasMin && !W::kTwoScales) y -= k.min[0] * (float)(x.sums[0] + x.sums[1]);
    return sum + y * x.scale;
}

template <int N>
struct Floats {
    float v[N];
    __device__ __forceinline__ void load(const Activations& x, u32 u) {
#pragma unroll
        for (int e = 0; e < N; e += 4) {
            const float4 f = reinterpret_cast<const float4*>(x.x)[(u * N + e) / 4];
            v[e] = f.x, v[e + 1] = f.y, v[e + 2] = f.z, v[e + 3] = f.w;
        }
    }
};
template <> struct Operand<F32> : Floats<4> {};
template <> struct Operand<F16> : Floats<8> {};
template <> struct Operand<BF16> : Floats<8> {};

template <class Block, int N>
__device__ __forceinline__ float float_dot(const Unit<Block>& w, const Floats<N>& x, float sum) {
    float v[N];
    w.values(0, v);
#pragma unroll
    for (int e = 0; e < N; ++e) sum = fmaf(v[e], x.v[e], sum);
    return sum;
}
__device__ __forceinline__ float dot(const Unit<F32>& w, u32, const Operand<F32>& x, float sum) {
    return float_dot(w, x, sum);
}
__device__ __forceinline__ float dot(const Unit<F16>& w, u32, const Operand<F16>& x, float sum) {
    return float_dot(w, x, sum);
}
__device__ __forceinline__ float dot(const Unit<BF16>& w, u32, const Operand<BF16>& x, float sum) {
    return float_dot(w, x, sum);
}

// Neighbouring rows of a matrix, or of two alike, and the warp's part in them.
struct Run {
    Planes planes, second;  // `second` where rows come in pairs
    u32 at;                 // where the first row begins, in units
    int count, row_units, part, parts;
};

// Units of ROWS rows in registers: of each the lane's next DEPTH. PAIRS: rows 0, 2, … are of one matrix, 1, 3, … of another.
template <class Block, int ROWS, int DEPTH, bool PAIRS = false>
struct Tile {
    Unit<Block> w[ROWS][DEPTH];

    // Loads from the run's unit `from` on; rows past the run's end keep what they hold.
    __device__ __forceinline__ void load(const Run& run, int from) {
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) {
            const int u = from + 32 * run.parts * i + threadIdx.x % 32;
            if (u >= run.row_units) continue;
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const int row = PAIRS ? r / 2 : r;
                if (row < run.count) w[r][i].load(PAIRS && r % 2 ? run.second : run.planes, run.at + row * run.row_units + u);
            }
        }
    }
    __device__ __forceinline__ void begin(const Run& run) { load(run, 32 * run.part); }

    // Adds this lane's part of each row to sums[r], from the units that `begin` loaded to the rows' end.
    __device__ __forceinline__ void add(float (&sums)[ROWS], const Run& run, const Activations& x) {
        for (int from = 32 * run.part;;) {
#pragma unroll
            for (int i = 0; i < DEPTH; ++i) {
                const int u = from + 32 * run.parts * i + threadIdx.x % 32;
                if (u >= run.row_units) continue;
                Operand<Block> v;
                v.load(x, u);
#pragma unroll
                for (int r = 0; r < ROWS; ++r) sums[r] = dot(w[r][i], u, v, sums[r]);  // rows begin at whole supers
            }
            from += 32 * run.parts * DEPTH;
            if (from >= run.row_units) return;
            load(run, from);
        }
    }
};

// Every lane gets the sums over the warp.
template <int ROWS>
__device__ __forceinline__ void sum_lanes(float (&sums)[ROWS]) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) sums[r] = warp_sum(sums[r]);
}

template <class Block>
constexpr bool kReadsBlocks = Unit<Block>::kElements == 32;
