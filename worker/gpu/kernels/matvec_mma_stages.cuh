// Stages of a decode product on the tensor cores: which units a block multiplies at a time, and
// their way from global memory to shared memory.
//
// A row's sum is a binary tree over 32 chains, those of the lanes of `WeightFragment` (vec_dot.cuh):
// chain l holds units l, l + 32·split_k, …, and the tree adds chains that differ in bit 16 first,
// then in bit 8, 4, 2 and 1. Of the WARPS_K warps along K, warp w takes the chains l with
// l % WARPS_K = w. A stage is two units of each warp, one of chain l and one of chain l + 16, and
// the stages of a pair of chains follow each other: a warp has two chains open.
// The weights of a stage are kLoads units a thread. They are loaded to registers AHEAD stages ahead,
// converted once for the block (signed codes, f32 scales) and stored in the other of two buffers.
// Activations are loaded two stages ahead: all blocks read the same lines of L2 at a time, which
// makes their latency longer than a stage.
#pragma once
#include "matvec_mma.cuh"

// Rows of activations: q and meta of q8_activations.cuh, factor [rows] or null (1).
struct Q8Rows {
    const u8* q;
    const Meta* meta;
    const float* factor;
    int rows, cols;
};

// A block: warps along K, weight rows and tokens; MMAs of a warp along rows and tokens.
template <class Block, int WARPS_K, int WARPS_M, int WARPS_N, int FRAGS_M, int NT>
struct StageShape {
    static constexpr int kWarps = WARPS_K * WARPS_M * WARPS_N, kThreads = 32 * kWarps;
    static constexpr int kRows = 16 * FRAGS_M * WARPS_M, kTokens = 8 * NT * WARPS_N;
    static constexpr int kUnits = 2 * WARPS_K, kPairs = 16 / WARPS_K;
    static constexpr int kLoads = kUnits * kRows / kThreads;
    static_assert(kLoads * kThreads == kUnits * kRows, "all threads load the same number of units");
    // Strides of units, with 16 bytes that keep the stores of adjacent units in different banks.
    static constexpr int kCodes = 32 * kRows + 16, kScales = 4 * RowScales<Block>::kWords * kRows + 16;
    static constexpr int kQ = 32 * kTokens + 16, kMeta = 4 * (1 + RowScales<Block>::kSums) * kTokens + 16;
    // Two buffers of converted units with three parts, three buffers of q, and the sums.
    static constexpr int kScalesAt = kUnits * kCodes, kMetaAt = kScalesAt + kUnits * kScales;
    static constexpr int kBuffer = kMetaAt + kUnits * kMeta, kQBuffer = kUnits * kQ;
    static constexpr int kQsAt = 2 * kBuffer, kSumsAt = kQsAt + 3 * kQBuffer;
    static constexpr int kLaneSums = 4 * FRAGS_M * NT, kLevels = kPairs == 1 ? 1 : kPairs / 2;
    static constexpr int kLevel = kThreads * kLaneSums * 4, kBytes = kSumsAt + kLevels * kLevel;
};

// A position in the order of stages: row tile, split, pair of chains, units of the chains.
template <int WARPS_K>
struct StageWalk {
    static constexpr int kPairs = 16 / WARPS_K;
    int tile, split, pair, block;  // block: of 32 units, of which the stage has two groups of WARPS_K

    // First unit of a stage: pairs in bit-reversed order. The second group is 16 units later.
    static __device__ __forceinline__ int first_unit(int pair, int block) {
        return 32 * block + WARPS_K * (kPairs == 4 ? pair >> 1 | (pair & 1) << 1 : pair);
    }
    __device__ __forceinline__ int base() const { return first_unit(pair, block); }
    // Go to the next stage; `enter_tile` is called at the first of a tile. A split has at least one
    // stage a pair.
    template <class Enter>
    __device__ __forceinline__ void advance(int blocks, int split_k, int tile_stride, Enter enter_tile) {
        block += split_k;
        if (block < blocks) return;
        if (++pair == kPairs) {
            pair = 0;
            if (++split == split_k) {
                split = 0, tile += tile_stride;
                enter_tile();
            }
        }
        block = split;
    }
};

// A thread's part in the copies of a stage: one unit of the stage, of rows and tokens that are
// kStride apart, and its places in a buffer (offsets are linear in the bits of row and token).
template <class Block, class Shape>
struct StageCopies {
    static constexpr int kStride = Shape::kThreads / Shape::kUnits;
    static constexpr int kMetas = (Shape::kTokens + kStride - 1) / kStride;
    static constexpr int kQs = (2 * Shape::kTokens + kStride - 1) / kStride;
    const Q8Rows& x;
    int units, slot, offset;               // offset of the slot's unit from the stage's first
    u32 meta_rows[kMetas], q_rows[kQs];    // units of x before those of the rows to copy
    int2 meta[2][kMetas];  // of the next stage and the one after it, by the parity of their numbers

    __device__ __forceinline__ StageCopies(const Q8Rows& x, int first_token)
        : x(x), units(x.cols / 32), slot(threadIdx.x % Shape::kUnits) {
        offset = slot % (Shape::kUnits / 2) + slot / (Shape::kUnits / 2) * 16;
        const auto token = [&](int t) -> u32 { return min(first_token + t, x.rows - 1); };
#pragma unroll
        for (int k = 0; k < kMetas; ++k) meta_rows[k] = token(row() + k * kStride) * units;
#pragma unroll
        for (int k = 0; k < kQs; ++k) q_rows[k] = (2 * token(row() / 2 + k * (kStride / 2)) + row() % 2) * units;
    }
    static __device__ __forceinline__ int row() { return threadIdx.x / Shape::kUnits; }
    // Units and tokens past the last ones are copies of it. The scale of x is zero there, which changes no sum.
    __device__ __forceinline__ int unit(int base) const { return min(base + offset, units - 1); }

    __device__ __forceinline__ void fetch_q(int base, u8* buffer) const {
        const int half = row() % 2, t0 = row() / 2;
        const u32 to = (u32)__cvta_generic_to_shared(buffer) + slot * Shape::kQ + q_offset(t0, half);
        const u32 from = unit(base);
#pragma unroll
        for (int k = 0; k < kQs; ++k) {
            const int t = k * (kStride / 2);
            if (Shape::kTokens % (kStride / 2) == 0 || t0 + t < Shape::kTokens)
                copy_16_async(to + q_offset(t, 0), reinterpret_cast<const uint4*>(x.q) + (q_rows[k] + from), true);
        }
        commit_copies();
    }
    template <int PARITY>
    __device__ __forceinline__ void load_meta(int base) {
#pragma unroll
        for (int k = 0; k < kMetas; ++k) {
            meta[PARITY][k] = make_int2(0, 0);
            const int t = row() + k * kStride;
            if ((Shape::kTokens % kStride == 0 || t < Shape::kTokens) && base + offset < units)
                meta[PARITY][k] = reinterpret_cast<const int2*>(x.meta)[meta_rows[k] + base + offset];
        }
    }
    template <int PARITY>
    __device__ __forceinline__ void store_meta(u8* buffer) const {
        constexpr int kSums = RowScales<Block>::kSums;
#pragma unroll
        for (int k = 0; k < kMetas; ++k) {
            const int t = row() + k * kStride;
            if (Shape::kTokens % kStride != 0 && t >= Shape::kTokens) break;
            float* const to = reinterpret_cast<float*>(buffer + Shape::kMetaAt + slot * Shape::kMeta) + t;
            const int2 m = meta[PARITY][k];
            const int low = (short)m.y, high = m.y >> 16;
            to[0] = __int_as_float(m.x);
            if (kSums == 1) to[Shape::kTokens] = (float)(low + high);
            if (kSums == 2) to[Shape::kTokens] = (float)low, to[2 * Shape::kTokens] = (float)high;
        }
    }
    // Convert and store the unit of the k-th row; `index`: of the unit in its row.
    __device__ __forceinline__ void store_weights(const Unit<Block>& w, int index, int k, u8* buffer) const {
        const Codes c = signed_codes(w);
        u8* const codes = buffer + slot * Shape::kCodes + code_offset(row(), 0) + code_offset(k * kStride, 0);
        *reinterpret_cast<uint4*>(codes) = make_uint4(c.w[0], c.w[1], c.w[2], c.w[3]);
        *reinterpret_cast<uint4*>(codes + code_offset(0, 1)) = make_uint4(c.w[4], c.w[5], c.w[6], c.w[7]);
        const RowScales<Block> s(w.scales.unpack(index));
        float* const to = reinterpret_cast<float*>(buffer + Shape::kScalesAt + slot * Shape::kScales) +
                          scale_offset<Block>(row()) + scale_offset<Block>(k * kStride);
        if constexpr (RowScales<Block>::kWords == 2)
            *reinterpret_cast<float2*>(to) = make_float2(s.v[0], s.v[1]);
        else
            *reinterpret_cast<float4*>(to) = make_float4(s.v[0], s.v[1], s.v[2], s.v[3]);
    }
};
