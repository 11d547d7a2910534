// Dot products of weight rows with one token's activations, for decode: a warp walks some rows' units side by side.
//
// Block types meet 8-bit activations (quantized.cuh) in dp4a, the sums of integers exact:
//     Σ (scale·(code - zero) - min)·x = x.scale · (scale·(Σ code·q - zero·Σ q) - min·Σ q)
// f32, f16 and bf16 meet f32 activations in fused multiply-adds. A lane takes units lane, lane + 32, …: kUnroll·ROWS
// units are loaded before the first is used. Sums go in a fixed order.
// Twins: `matmul` in worker/cpu/plain.py, and with activations quantized alike worker/cpu/quantized.py.
#pragma once
#include "formats.cuh"
#include "quantized.cuh"
#include "warp.cuh"

constexpr int kUnroll = 2;

// A token's activations; which of them a type reads: q and meta, or x.
struct Activations {
    const u8* q;
    const Meta* meta;
    const float* x;
    int cols;
    __device__ Activations row(int t) const {
        return {q + (size_t)t * cols, meta + (size_t)t * (cols / 32), x + (size_t)t * cols, cols};
    }
};

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

// Adds to sums[r] this lane's part of rows first + r (those past `last` are read as `last`) of a matrix whose first row
// starts at unit `base`; the warp is `part` of `parts` that share the rows.
template <class Block, int ROWS>
__device__ __forceinline__ void add_dots(float (&sums)[ROWS], const Planes& planes, u32 base, int first, int last,
                                         const Activations& x, int row_units, int part, int parts) {
    u32 at[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) at[r] = base + (u32)min(first + r, last) * row_units;
    const int lane = threadIdx.x % 32, stride = 32 * parts;
    for (int chunk = 32 * part; chunk < row_units; chunk += kUnroll * stride) {
        Unit<Block> w[kUnroll][ROWS];
        Operand<Block> v[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const int u = chunk + i * stride + lane;
            if (u >= row_units) continue;
#pragma unroll
            for (int r = 0; r < ROWS; ++r) w[i][r].load(planes, at[r] + u);
        }
#pragma unroll
        for (int i = 0; i < kUnroll; ++i)
            if (chunk + i * stride + lane < row_units) v[i].load(x, chunk + i * stride + lane);
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const int u = chunk + i * stride + lane;
            if (u >= row_units) continue;
#pragma unroll
            for (int r = 0; r < ROWS; ++r) sums[r] = dot(w[i][r], at[r] + u, v[i], sums[r]);
        }
    }
}

// Every lane gets the sums over the warp.
template <int ROWS>
__device__ __forceinline__ void sum_lanes(float (&sums)[ROWS]) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) sums[r] = warp_sum(sums[r]);
}
