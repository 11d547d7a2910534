// Tiles of T activation rows for decode products of several rows: staging in shared memory, dot
// products that use each loaded weight T times, and their sums over a warp.
//
// Every row's sum has the order and the rounding of a product of one row (vec_dot.cuh, warp.cuh).
// Users: matvec_rows.cu, glu_rows.cu.
#pragma once
#include "vec_dot.cuh"
#include "mma.cuh"

// Rows of a product in global memory, prepared by quantize_rows.cu or by the producer: q, meta
// (q8_activations.cuh), x [R, cols] f32, factor [R] f32 or null for 1. What no weight reads is
// null.
// With `norm`, x is the input of an RMSNorm, which every block of matvec_rows applies and quantizes
// for itself: cols is at most 256·kWarps.
struct PreparedRows {
    const float* x;
    const u8* q;
    const Meta* meta;
    const float* factor;
    int rows, cols;
    const float* norm;
    float eps;
};

// Stage norm(x) of rows [first, first + T), without the factors, which follow after a barrier. A
// warp takes 256 elements of a row at a time; sums of squares have the order of `stage`
// (stage_activations.cuh), whose warp w takes elements 256·w to 256·w + 255.
template <int T, bool Q8, bool F32>
__device__ __forceinline__ void stage_normed_tile(const PreparedRows& in, int first, float* plain, u8* q, Meta* meta,
                                                  float (&factors)[T]) {
    __shared__ float squares_of[T][kWarps];
    const int cols = in.cols, lane = threadIdx.x % 32, parts = (cols + 255) / 256;
    if (threadIdx.x < T * kWarps) squares_of[0][threadIdx.x] = 0.f;
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x / 32; i < T * parts; i += blockDim.x / 32) {
        const int t = i / parts, part = i % parts, column = 256 * part + 8 * lane;
        float4 v[2] = {};
        float squares = 0.f;
        if (column < cols && first + t < in.rows) {
            const float4* x = reinterpret_cast<const float4*>(in.x + (size_t)(first + t) * cols + column);
            const float4* weight = reinterpret_cast<const float4*>(in.norm + column);
            v[0] = x[0], v[1] = x[1];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float4 w = __ldg(weight + j);
                squares = __fadd_rn(squares, sum_of_squares(v[j]));
                v[j] = make_float4(v[j].x * w.x, v[j].y * w.y, v[j].z * w.z, v[j].w * w.w);
            }
        }
        if (F32 && column < cols) {
            float4* to = reinterpret_cast<float4*>(plain + t * cols + column);
            to[0] = v[0], to[1] = v[1];
        }
        if (Q8) store_quantized(v, column, cols, q + t * cols, meta + t * (cols / 32));
        squares = warp_sum(squares);
        if (lane == 0) squares_of[t][part] = squares;
    }
    __syncthreads();
    const int t = threadIdx.x / 32;
    if (t >= T) return;
    const float mean = __fdiv_rn(warp_sum<kWarps>(squares_of[t][lane % kWarps]), (float)cols);
    if (lane == 0) factors[t] = rsqrtf(__fadd_rn(mean, in.eps));
}

// Stage rows [first, first + T) and their factors with all threads of the block, at least T warps;
// rows from `rows` on are zeros. MAY_NORM: `norm` is not always null. Ends with a barrier. `shared`
// holds T·cols·(4·F32 + 1.25·Q8) bytes, 16-byte aligned.
template <int T, bool Q8, bool F32, bool MAY_NORM>
__device__ __forceinline__ StagedRows stage_tile(const PreparedRows& in, int first, u8* shared, float (&factors)[T]) {
    const int cols = in.cols, count = min(T, in.rows - first);
    float* plain = reinterpret_cast<float*>(shared);
    u8* q = shared + (F32 ? 4 * T * cols : 0);
    Meta* meta = reinterpret_cast<Meta*>(q + T * cols);
    if (MAY_NORM && in.norm) {
        stage_normed_tile<T, Q8, F32>(in, first, plain, q, meta, factors);
        __syncthreads();
        return {q, meta, plain, cols};
    }
    if (threadIdx.x < T) factors[threadIdx.x] = in.factor && threadIdx.x < count ? in.factor[first + threadIdx.x] : 1.f;
    const auto copy = [&](void* to, const void* from, int bytes_a_row) {
        const u8* source = static_cast<const u8*>(from) + (size_t)first * bytes_a_row;
#pragma unroll 4
        for (int at = 16 * threadIdx.x; at < T * bytes_a_row; at += 16 * blockDim.x)
            copy_16_async(static_cast<u8*>(to) + at, source + at, at < count * bytes_a_row);
    };
    if (Q8) copy(q, in.q, cols);
    if (F32) copy(plain, in.x, 4 * cols);
    commit_copies();
    if (Q8) {
        const int each = cols / 32;
        const int2* source = reinterpret_cast<const int2*>(in.meta) + (size_t)first * each;
#pragma unroll 4
        for (int i = threadIdx.x; i < T * each; i += blockDim.x)
            reinterpret_cast<int2*>(meta)[i] = i < count * each ? source[i] : make_int2(0, 0);
    }
    wait_for_copies<0>();
    __syncthreads();
    return {q, meta, plain, cols};
}

// A lane's fragment of TILE_M weight rows, as `WeightFragment`, for T activation rows.
template <class Block, int TILE_M, int UNROLL_K, int T, bool INTERLEAVED = false>
struct TileFragment : WeightFragment<Block, TILE_M, UNROLL_K, INTERLEAVED> {
    // Add this lane's share of each dot product to sums[t·TILE_M + r], starting with the units that
    // `load_first` loaded.
    __device__ __forceinline__ void accumulate(float (&sums)[T * TILE_M], const RowSpan& span, const StagedRows& x) {
        for (int from = 32 * span.split;;) {
#pragma unroll
            for (int i = 0; i < UNROLL_K; ++i) {
                const int u = from + 32 * span.split_k * i + threadIdx.x % 32;
                if (u >= span.row_units) continue;
#pragma unroll
                for (int t = 0; t < T; ++t) {
                    ActivationUnit<Block> v;
                    v.load(x.row(t), u);
#pragma unroll
                    for (int r = 0; r < TILE_M; ++r)
                        sums[t * TILE_M + r] = vec_dot(this->w[r][i], u, v, sums[t * TILE_M + r]);
                }
            }
            from += 32 * span.split_k * UNROLL_K;
            if (from >= span.row_units) return;
            this->load(span, from);
        }
    }
};

// One step of `warp_sum_each`, and those after it: lanes that differ in bit STEP exchange halves of
// 2·HALF values and add. The masks compile to one instruction a value; conditional expressions
// compile to branches.
template <int HALF, int STEP, int N>
__device__ __forceinline__ void add_exchanged_halves(float (&v)[N]) {
    const u32 upper = threadIdx.x & STEP ? 0xffffffffu : 0u;
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
        const u32 a = __float_as_uint(v[i]), b = __float_as_uint(v[i + HALF]);
        const float kept = __uint_as_float((a & ~upper) | (b & upper));
        const float sent = __uint_as_float((b & ~upper) | (a & upper));
        v[i] = __fadd_rn(kept, __shfl_xor_sync(0xffffffffu, sent, STEP));
    }
    if constexpr (HALF > 1) add_exchanged_halves<HALF / 2, STEP / 2>(v);
}

// Sum each of N values over the warp, N a power of two from 2 to 32: lane l gets the sum of value
// l / (32/N). The additions are those of `warp_sum`; a step sends half of the values only.
template <int N>
__device__ __forceinline__ float warp_sum_each(float (&v)[N]) {
    add_exchanged_halves<N / 2, 16>(v);
#pragma unroll
    for (int step = 16 / N; step; step /= 2) v[0] = __fadd_rn(v[0], __shfl_xor_sync(0xffffffffu, v[0], step));
    return v[0];
}
