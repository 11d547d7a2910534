// Stages of an experts' product on the int8 tensor cores: copies of weights to shared memory, and
// the staged activations of a tile's pairs.
//
// A chunk is 32 elements of h, that is 32 rows of gate and of up, or 32 rows of down. A stage is 16
// rows of weights with all their units: 8 rows of gate and the 8 of up with the same numbers, or 16
// rows of down. Its bytes are contiguous in each matrix. Stages are copied a ring of slots ahead,
// across the ends of chunks and tiles.
// Of a block's 20 warps, 16 multiply, each its slice of a stage's units, and 4 finish: they copy
// stages, add the slices' sums and write results, so that multipliers wait for neither.
#pragma once
#include "bulk_copy.cuh"
#include "expert_tiles.cuh"
#include "formats.cuh"
#include "mma_s8.cuh"
#include "pair_product.cuh"

constexpr int kSlices = 16, kFinishers = 4;  // warps that multiply, and warps that add and write results
constexpr int kMultiplierThreads = 32 * kSlices, kFinisherThreads = 32 * kFinishers;
constexpr int kMmaThreads = kMultiplierThreads + kFinisherThreads;
constexpr int kChunk = 32, kStageRows = 16;
template <bool GATED>
constexpr int kStages = (GATED ? 2 : 1) * kChunk / kStageRows;  // of a chunk

// A stage in shared memory: codes [16][units] of 16 bytes, with 16 bytes after each 4 rows, so that
// 8 adjacent rows are in different banks if units mod 4 is 2; and scales [16][units] of a byte.
__device__ __forceinline__ int row_offset(int row, int units) { return 16 * (row * units + row / 4); }
__device__ __forceinline__ int stage_codes_bytes(int units) { return row_offset(kStageRows, units); }
__device__ __forceinline__ int stage_bytes(int units) { return stage_codes_bytes(units) + kStageRows * units; }

// The warp's number in its block, which the compiler then knows to be uniform.
__device__ __forceinline__ int uniform_warp() { return __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0); }

// Copies of stages to a ring of SLOTS slots, by the finishers: the i-th stage of a block is in slot
// i mod SLOTS. From sm_90 on, one finisher issues bulk copies; before, all copy 16 bytes at a time.
template <int SLOTS, bool GATED>
struct StageCopies {
    ChunkWalk walk;   // of the next stage to copy
    int stage, slot;  // of its chunk; its slot
    u32 slots, full;  // the ring; a barrier a slot

    __device__ __forceinline__ StageCopies(const ChunkWalk& from, u8* ring, unsigned long long* barriers)
        : walk(from), stage(0), slot(0), slots((u32)__cvta_generic_to_shared(ring)),
          full((u32)__cvta_generic_to_shared(barriers)) {}

    // Begin to copy the next `count` stages, to the slots that were read last; or, if another
    // finisher does, only follow.
    __device__ __forceinline__ void next(const PairProduct& p, int units, int count, bool copying) {
#pragma unroll 1
        for (int i = 0; i < count; ++i) next(p, units, copying);
    }
    __device__ __forceinline__ void next(const PairProduct& p, int units, bool copying) {
        if (walk.valid()) {
            if (copying) copy(p, units);
            if (++slot == SLOTS) slot = 0;
            if (++stage == kStages<GATED>) stage = 0, walk.advance();
        }
#if __CUDA_ARCH__ < 900
        commit_copies();
#endif
    }

private:
    // Row r of the stage: its number in all experts' rows.
    __device__ __forceinline__ u32 row(const PairProduct& p, int r) const {
        const int in_matrix = GATED ? 8 * stage + r % 8 : kStageRows * stage + r;
        return (u32)walk.tile.expert * p.rows + kChunk * walk.chunk + in_matrix;
    }
    __device__ __forceinline__ void copy(const PairProduct& p, int units) const {
        const u32 to = slots + slot * stage_bytes(units), scales = to + stage_codes_bytes(units);
#if __CUDA_ARCH__ >= 900
        const int lane = threadIdx.x % 32;
        const u32 barrier = full + 8 * slot;
        if (lane == 0) expect_bytes(barrier, (16 + 1) * kStageRows * units);
        __syncwarp();
        if (lane >= 6) return;
        const bool codes = lane < 4;  // a lane copies 4 rows of codes, or 8 rows of scales
        const int r = codes ? 4 * lane : 8 * (lane - 4);
        const Planes& planes = p.planes[GATED ? r / 8 : 0];
        const size_t unit = row(p, r) * (u32)units;
        const u8* const from = codes ? planes.low + 16 * unit : planes.scales + unit;
        copy_bulk(codes ? to + row_offset(r, units) : scales + r * units, from, codes ? 64 * units : 8 * units, barrier);
#else
        const int thread = threadIdx.x - kMultiplierThreads;
#pragma unroll 1
        for (int r = 0; r < kStageRows; ++r) {
            const Planes& planes = p.planes[GATED ? r / 8 : 0];
            const size_t unit = row(p, r) * (u32)units;
            for (int u = thread; u < units; u += kFinisherThreads) {
                copy_16_async(to + row_offset(r, units) + 16 * u, planes.low + 16 * (unit + u), true);
                if (r % 8 == 0 && 2 * u < units)
                    copy_16_async(scales + r * units + 16 * u, planes.scales + unit + 16 * u, true);
            }
        }
#endif
    }
};

// Activations of one unit and 8·GROUPS pairs in shared memory. Of group g, lane l needs words c and
// c + 4 of pair l/4 for B (c = l%4), and for its pairs of the accumulator, 2·c and 2·c + 1, the
// scales and, with STARTS, the integers where the sums of rows l/4 and l/4 + 8 start, which account
// for the zero point of the codes.
template <int GROUPS, bool STARTS>
struct RecordStarts {
    int starts[GROUPS][4][2][2];
};
template <int GROUPS>
struct RecordStarts<GROUPS, false> {};
template <int GROUPS, bool STARTS>
struct __align__(16) PairRecord : RecordStarts<GROUPS, STARTS> {
    uint2 b[32][GROUPS];
    float scales[4][GROUPS][2];
    // Store one unit of pair n of group g.
    __device__ __forceinline__ void store(int g, int n, uint4 low, uint4 high, int2 meta) {
        b[4 * n][g] = make_uint2(low.x, high.x), b[4 * n + 1][g] = make_uint2(low.y, high.y);
        b[4 * n + 2][g] = make_uint2(low.z, high.z), b[4 * n + 3][g] = make_uint2(low.w, high.w);
        scales[n / 2][g][n % 2] = __int_as_float(meta.x);
        if constexpr (STARTS) {
            const int start = kIntBiasBits - Unit<MXFP4>::kZero * ((short)meta.y + (meta.y >> 16));
            this->starts[g][n / 2][0][n % 2] = this->starts[g][n / 2][1][n % 2] = start;
        }
    }
};

// Groups of 8 pairs of a record, and records of a unit, for NT groups.
template <int NT>
constexpr int kGroups = NT == 1 ? 1 : 2;
template <int NT>
constexpr int kRecords = (NT + 1) / 2;

// Of a tile's pairs: which they are, and the factor of the input's row or the pair's weight.
template <int MAX_NT>
struct TilePairs {
    int pair[8 * MAX_NT];
    float factor[8 * MAX_NT];
};

// By the finishers. A barrier must follow.
template <bool GATED, int MAX_NT>
__device__ __forceinline__ void find_pairs(const PairProduct& p, const ExpertTiles& tiles, const ExpertTile& tile,
                                           TilePairs<MAX_NT>& pairs) {
    const int t = threadIdx.x - kMultiplierThreads;
    if (t >= tile.count) return;
    const int pair = tiles.order[tile.first + t];
    pairs.pair[t] = pair;
    pairs.factor[t] = GATED ? (p.factor ? p.factor[pair / p.pairs_per_row] : 1.f) : p.weights[pair];
}

// Stage the activations of a tile of up to 8·NT pairs, by the multipliers: x [units][kRecords<NT>],
// zeros past the last pair. A barrier must follow.
template <int NT, bool STARTS>
__device__ __forceinline__ void stage_activations(const PairProduct& p, const ExpertTiles& tiles, const ExpertTile& tile,
                                                  PairRecord<kGroups<NT>, STARTS>* x) {
    const int units = p.cols / 32, thread = threadIdx.x, n = thread % 8;
#pragma unroll 1
    for (int group = 0; group < NT; ++group) {
        const int t = 8 * group + n;
        const bool valid = t < tile.count;
        const size_t row = valid ? tiles.order[tile.first + t] / p.pairs_per_row : 0;
        const uint4* const q = reinterpret_cast<const uint4*>(p.q + row * p.cols);
        const int2* const meta = reinterpret_cast<const int2*>(p.meta + row * units);
#pragma unroll 2
        for (int u = thread / 8; u < units; u += kMultiplierThreads / 8) {
            uint4 a = make_uint4(0, 0, 0, 0), b = a;
            int2 m = make_int2(0, 0);
            if (valid) a = q[u], b = q[units + u], m = meta[u];
            x[u * kRecords<NT> + group / 2].store(group % 2, n, a, b, m);
        }
    }
}
