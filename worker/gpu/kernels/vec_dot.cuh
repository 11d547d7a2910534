// Dot products of weight rows with one token's activations for decode: the lanes of a warp walk the
// units of some rows.
//
// Weights of the block types meet Q8 activations (q8_activations.cuh) in dp4a, with exact integer
// sums:
//     Σ (scale·(code - zero) - min)·x = x.scale · (scale·(Σ code·q - zero·Σ q) - min·Σ q)
// F32, F16 and BF16 meet f32 activations in fused multiply-adds. A lane takes units lane, lane +
// 32, …: TILE_M·UNROLL_K units of a warp's rows are in flight together, the first ones before the
// activations are staged. Order of a row's sum: a lane's units ascending, then the warp's
// butterfly; every contraction is written out (`__fmaf_rn`), so that the order and the rounding do
// not depend on the compiler.
// Twins: `matmul` in worker/cpu/plain.py; with quantized activations tests/quantized_ops.py.
#pragma once
#include "formats.cuh"
#include "stage_activations.cuh"

// Activations of one unit of weights in registers; the block types' are Q8.
template <class Block>
struct ActivationUnit {
    int q[8];
    float scale;
    int sums[2];
    __device__ __forceinline__ void load(const StagedRows& x, u32 u) {
        const uint4* halves = reinterpret_cast<const uint4*>(x.q);
        const uint4 a = halves[u], b = halves[x.cols / 32 + u];
        q[0] = a.x, q[1] = a.y, q[2] = a.z, q[3] = a.w, q[4] = b.x, q[5] = b.y, q[6] = b.z, q[7] = b.w;
        const int2 m = reinterpret_cast<const int2*>(x.meta)[u];
        scale = __int_as_float(m.x), sums[0] = (short)m.y, sums[1] = m.y >> 16;
    }
};

template <int N>
struct F32ActivationUnit {
    float v[N];
    __device__ __forceinline__ void load(const StagedRows& x, u32 u) {
#pragma unroll
        for (int e = 0; e < N; e += 4) {
            const float4 f = reinterpret_cast<const float4*>(x.x)[(u * N + e) / 4];
            v[e] = f.x, v[e + 1] = f.y, v[e + 2] = f.z, v[e + 3] = f.w;
        }
    }
};
template <> struct ActivationUnit<F32> : F32ActivationUnit<4> {};
template <> struct ActivationUnit<F16> : F32ActivationUnit<8> {};
template <> struct ActivationUnit<BF16> : F32ActivationUnit<8> {};

// sum + w·x over unit u of a row.
template <class Block>
__device__ __forceinline__ float vec_dot(const Unit<Block>& w, u32 u, const ActivationUnit<Block>& x, float sum) {
    using W = Unit<Block>;
    const Codes c = w.packed.unpack();
    const Scales k = w.scales.unpack(u);
    int a = 0, b = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) a = __dp4a(c.w[i], x.q[i], a), b = __dp4a(c.w[i + 4], x.q[i + 4], b);
    a -= W::kZero * x.sums[0], b -= W::kZero * x.sums[1];
    float y;
    if constexpr (W::kTwoScales) {
        y = __fmaf_rn(k.scale[0], (float)a, __fmul_rn(k.scale[1], (float)b));
        if constexpr (W::kHasMin)
            y = __fsub_rn(y, __fmaf_rn(k.min[0], (float)x.sums[0], __fmul_rn(k.min[1], (float)x.sums[1])));
    } else if constexpr (W::kHasMin) {
        y = __fmaf_rn(k.scale[0], (float)(a + b), -__fmul_rn(k.min[0], (float)(x.sums[0] + x.sums[1])));
    } else {
        y = __fmul_rn(k.scale[0], (float)(a + b));
    }
    return __fmaf_rn(y, x.scale, sum);
}

template <class Block, int N>
__device__ __forceinline__ float vec_dot_f32(const Unit<Block>& w, const F32ActivationUnit<N>& x, float sum) {
    float v[N];
    w.to_float(0, v);
#pragma unroll
    for (int e = 0; e < N; ++e) sum = __fmaf_rn(v[e], x.v[e], sum);
    return sum;
}
__device__ __forceinline__ float vec_dot(const Unit<F32>& w, u32, const ActivationUnit<F32>& x, float sum) {
    return vec_dot_f32(w, x, sum);
}
__device__ __forceinline__ float vec_dot(const Unit<F16>& w, u32, const ActivationUnit<F16>& x, float sum) {
    return vec_dot_f32(w, x, sum);
}
__device__ __forceinline__ float vec_dot(const Unit<BF16>& w, u32, const ActivationUnit<BF16>& x, float sum) {
    return vec_dot_f32(w, x, sum);
}

// The rows that a warp loads from: `rows` adjacent rows of a matrix from unit `first_unit` on, of
// which the warp takes split `split` of `split_k`. `up_planes`: the second matrix where rows
// alternate between two (gate and up).
struct RowSpan {
    Planes planes, up_planes;
    u32 first_unit;
    int rows, row_units, split, split_k;
};

// A lane's fragment of the weights in registers: of each of TILE_M rows the next UNROLL_K units.
// INTERLEAVED: rows 0, 2, … are of one matrix, rows 1, 3, … of the other.
template <class Block, int TILE_M, int UNROLL_K, bool INTERLEAVED = false>
struct WeightFragment {
    Unit<Block> w[TILE_M][UNROLL_K];

    // Load units from unit `from` of each row on; rows past the end of the span are not loaded.
    __device__ __forceinline__ void load(const RowSpan& span, int from) {
#pragma unroll
        for (int i = 0; i < UNROLL_K; ++i) {
            const int u = from + 32 * span.split_k * i + threadIdx.x % 32;
            if (u >= span.row_units) continue;
#pragma unroll
            for (int r = 0; r < TILE_M; ++r) {
                const int row = INTERLEAVED ? r / 2 : r;
                const Planes& planes = INTERLEAVED && r % 2 ? span.up_planes : span.planes;
                if (row < span.rows) w[r][i].load(planes, span.first_unit + row * span.row_units + u);
            }
        }
    }
    __device__ __forceinline__ void load_first(const RowSpan& span) { load(span, 32 * span.split); }

    // Add this lane's share of each row's dot product to sums[r], starting with the units that
    // `load_first` loaded.
    __device__ __forceinline__ void accumulate(float (&sums)[TILE_M], const RowSpan& span, const StagedRows& x) {
        for (int from = 32 * span.split;;) {
#pragma unroll
            for (int i = 0; i < UNROLL_K; ++i) {
                const int u = from + 32 * span.split_k * i + threadIdx.x % 32;
                if (u >= span.row_units) continue;
                ActivationUnit<Block> v;
                v.load(x, u);
#pragma unroll
                for (int r = 0; r < TILE_M; ++r) sums[r] = vec_dot(w[r][i], u, v, sums[r]);  // rows start at whole supers
            }
            from += 32 * span.split_k * UNROLL_K;
            if (from >= span.row_units) return;
            load(span, from);
        }
    }
};

// Sum each row over the warp; every lane gets all sums.
template <int TILE_M>
__device__ __forceinline__ void warp_sum_rows(float (&sums)[TILE_M]) {
#pragma unroll
    for (int r = 0; r < TILE_M; ++r) sums[r] = warp_sum(sums[r]);
}

template <class Block>
constexpr bool kReadsQ8 = Unit<Block>::kElements == 32;
