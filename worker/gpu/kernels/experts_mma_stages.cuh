// Stages of an experts' product on the int8 tensor cores: a warp's copies of weights, and the
// staged activations of a tile's pairs.
//
// A chunk is kChunkRows rows of an expert's weights: 32 rows of gate and of up, or 64 rows of down.
// Its 16 warps are 4 row tiles of 16 rows, each of 4 warps along K. Of the 32 chains of a row's sum
// (vec_dot.cuh) warp w along K takes chains 2·w and 2·w + 1, and those 8, 16 and 24 further on. It
// goes in steps of two adjacent units of 16 rows, 32 adjacent bytes a row: first units 2·w + 16·i
// of chains l and l + 16, then, the second half, units 2·w + 8 + 16·i. Rows have an even number of
// units, at least 16. A stage is one step, or the two steps of chains l and l + 16.
// A warp copies the codes of its own stages to its own part of shared memory, all slots but one
// ahead, across the ends of chunks and tiles, so that no barrier is needed. Codes stay packed: word
// c of a unit is what lane c of four needs for A, as `ldmatrix` distributes rows of 16 bytes.
#pragma once
#include "expert_tiles.cuh"
#include "formats.cuh"
#include "mma_s8.cuh"
#include "pair_product.cuh"

constexpr int kRowTiles = 4, kChainWarps = 4, kMmaWarps = kRowTiles * kChainWarps, kMmaThreads = 32 * kMmaWarps;
constexpr int kChunkRows = 16 * kRowTiles, kStepUnits = 16, kStepBytes = 512;
constexpr int kBiasBytes = 4 * kChunkRows;

// The place of a warp in its block. Warps of one scheduler, warp%4, have different chains, since
// the first chains may have more units than the last ones.
struct MmaWarp {
    int row_tile, chains, units;
    __device__ __forceinline__ explicit MmaWarp(int row_units) : units(row_units) {
        const int warp = threadIdx.x / 32;
        row_tile = warp / kChainWarps, chains = (warp + row_tile) % kChainWarps;
    }
    // First unit of either half; the steps are kStepUnits apart.
    __device__ __forceinline__ int first_unit(int half) const { return 8 * half + 2 * chains; }
};

// Row r of a row tile: its matrix, and its row there, which may be past the last one.
template <bool GATED>
__device__ __forceinline__ int chunk_row(int chunk, int row_tile, int r) {
    return GATED ? kChunkRows / 2 * chunk + 8 * row_tile + r % 8 : kChunkRows * chunk + 16 * row_tile + r;
}

// As `copy_16_async` (mma.cuh) without zeros; brings the whole 128-byte line to L2, of which the
// other warps along K copy the rest.
__device__ __forceinline__ void copy_16_of_line_async(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "n"(16) : "memory");
}

// The codes of the warp's next stages of STEPS steps. Lane 2·r + j copies unit j of row r. Rows 4
// to 7 of 8 have their units swapped, so that the 8 rows that `ldmatrix` reads together are in
// different banks.
template <int STEPS, bool GATED>
struct CodeStream {
    ChunkWalk walk;
    const uint4* row;  // the first unit of this lane's row
    int unit, half;    // of the next stage; after the last chunk the unit is past the row
    u32 to;            // this lane's place in the first slot

    __device__ __forceinline__ CodeStream(const PairProduct& p, const ChunkWalk& from, const MmaWarp& warp, void* slots)
        : walk(from) {
        const int lane = threadIdx.x % 32;
        to = (u32)__cvta_generic_to_shared(slots) + 16 * (lane ^ (lane >> 3 & 1));
        enter_chunk(p, warp);
    }
    __device__ __forceinline__ void enter_chunk(const PairProduct& p, const MmaWarp& warp) {
        half = 0, unit = warp.units;
        if (!walk.valid()) return;
        const int lane = threadIdx.x % 32, r = lane / 2, in_chunk = chunk_row<GATED>(walk.chunk, warp.row_tile, r);
        const u32 first = ((u32)walk.tile.expert * p.rows + min(in_chunk, p.rows - 1)) * (u32)warp.units;
        row = reinterpret_cast<const uint4*>(p.planes[GATED ? r / 8 : 0].low) + (first + lane % 2);
        unit = warp.first_unit(0);
    }
    // Begin to copy the next stage to the slot at `offset`; an empty group of copies after the last
    // one.
    __device__ __forceinline__ void copy(const PairProduct& p, const MmaWarp& warp, int offset) {
        if (unit < warp.units) {
            const uint4* const from = row + unit;
            copy_16_of_line_async(to + offset, from);
            if (STEPS == 2 && unit + kStepUnits < warp.units)
                copy_16_of_line_async(to + offset + kStepBytes, from + kStepUnits);
            unit += STEPS * kStepUnits;
            if (unit >= warp.units) {
                if (half == 0) {
                    half = 1, unit = warp.first_unit(1);
                } else {
                    walk.advance();
                    enter_chunk(p, warp);
                }
            }
        }
        commit_copies();
    }
};

// Begin to copy the scales, a byte a unit, and the biases of a chunk's rows, by all threads. `to`
// is [kChunkRows][units] bytes, with GATED the rows of gate before those of up, then the biases.
template <bool GATED>
__device__ __forceinline__ void copy_scales(const PairProduct& p, const ChunkWalk& walk, u8* to) {
    constexpr int kMatrices = GATED ? 2 : 1, kRows = kChunkRows / kMatrices;
    if (!walk.valid()) return;
    const int units = p.cols / 32, first = kRows * walk.chunk, rows = min(kRows, p.rows - first);
    const size_t row = (size_t)walk.tile.expert * p.rows + first;
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) {
        const u8* const scales = p.planes[m].scales + row * units;
        for (int i = 16 * threadIdx.x; i < rows * units; i += 16 * kMmaThreads)
            copy_16_async(to + m * kRows * units + i, scales + i, true);
        const int i = 4 * (threadIdx.x - 32 * m);
        if (p.bias[m] && i >= 0 && i < rows)
            copy_16_async(to + kChunkRows * units + 4 * (m * kRows + i), p.bias[m] + row + i, true);
    }
}

// The staged activations of up to 8·NT pairs: a record for each unit and 8 pairs n. Of it, lane l
// needs the 8 bytes at 8·l for B: words c and c + 4 of pair n = l/4, c = l%4; for its two pairs of
// the accumulator, 2·c and 2·c + 1, the scales; and with STARTS the integers where the sums of rows
// l/4 and l/4 + 8 start, which account for the zero point of the codes.
template <bool STARTS>
struct SumStarts {
    int starts[4][2][2];
};
template <>
struct SumStarts<false> {};
template <bool STARTS>
struct __align__(16) PairRecord : SumStarts<STARTS> {
    uint2 b[32];
    float scales[8];
    // Store unit u of `row` for pair n.
    __device__ __forceinline__ void store(int n, uint4 low, uint4 high, int2 meta) {
        uint4* const q = reinterpret_cast<uint4*>(b + 4 * n);
        q[0] = make_uint4(low.x, high.x, low.y, high.y), q[1] = make_uint4(low.z, high.z, low.w, high.w);
        scales[n] = __int_as_float(meta.x);
        if constexpr (STARTS) {
            const int start = kIntBiasBits - Unit<MXFP4>::kZero * ((short)meta.y + (meta.y >> 16));
            this->starts[n / 2][0][n % 2] = this->starts[n / 2][1][n % 2] = start;
        }
    }
};

// Of a tile's pairs: which they are, and the factor of the input's row or the pair's weight.
template <int MAX_NT>
struct TilePairs {
    int pair[8 * MAX_NT];
    float factor[8 * MAX_NT];
};

// Stage the activations of a tile's pairs, by all threads: x [units][⌈count/8⌉] records, zeros past
// the last pair. A barrier must follow.
template <bool GATED, bool STARTS, int MAX_NT>
__device__ __forceinline__ void stage_pairs(const PairProduct& p, const ExpertTiles& tiles, const ExpertTile& tile,
                                            TilePairs<MAX_NT>& pairs, PairRecord<STARTS>* x) {
    const int units = p.cols / 32, groups = (tile.count + 7) / 8, thread = threadIdx.x, n = thread % 8;
    if (thread < tile.count) {
        const int pair = tiles.order[tile.first + thread];
        pairs.pair[thread] = pair;
        pairs.factor[thread] = GATED ? (p.factor ? p.factor[pair / p.pairs_per_row] : 1.f) : p.weights[pair];
    }
#pragma unroll 1
    for (int group = 0; group < groups; ++group) {
        const int t = 8 * group + n;
        const bool valid = t < tile.count;
        const size_t row = valid ? tiles.order[tile.first + t] / p.pairs_per_row : 0;
        const uint4* const q = reinterpret_cast<const uint4*>(p.q + row * p.cols);
        const int2* const meta = reinterpret_cast<const int2*>(p.meta + row * units);
#pragma unroll 2
        for (int u = thread / 8; u < units; u += kMmaThreads / 8) {
            uint4 a = make_uint4(0, 0, 0, 0), b = a;
            int2 m = make_int2(0, 0);
            if (valid) a = q[u], b = q[units + u], m = meta[u];
            x[u * groups + group].store(n, a, b, m);
        }
    }
}
