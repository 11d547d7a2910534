// Decode of several rows: an expert's products for up to kTilePairs pairs of a row and an expert,
// each weight loaded once for all of them.
//
// GATED: h[p] = gated(W_gate·n[p/k] + b_gate, W_up·n[p/k] + b_up).
// Otherwise: y[p] = weights[p]·(W·h[p] + b).
// Shapes: W [E, rows, cols] in planes of type W; biases [E, rows] f32 or null; input rows as Q8
// blocks, n [R, cols] with a factor each, or h [R·k, cols]; h as f32 and as Q8 blocks (q and meta
// are null unless rows is a multiple of 32), y [R·k, rows] f32. Rows of inactive pairs are not
// written.
// Grid: x over equal shares of the work, any number; 256 threads. The work is the chunks of all
// tiles (expert_tiles.cuh): 32 elements of h, or 32 rows of W. A warp takes 4 rows of W at a time,
// two a lane (expert_dots.cuh); the pairs' activations are staged in shared memory once a tile.
// Alignment: planes and q 16 bytes. Dynamic shared memory: ChunkSums and PairRows. Bytes: the
// weights of each distinct expert once for each of its tiles, 16-byte loads, 2·kUnroll of them in
// flight a lane, across the ends of chunks and tiles.
// Order and rounding: the bits of glu.cu with experts and of the products of experts_add.cu.
// Twins: `experts_glu`, `experts_add` in worker/cpu/ops.py; tests/quantized_ops.py. Launcher:
// worker/gpu/decode_experts.py.
#include "expert_dots.cuh"
#include "expert_tiles.cuh"
#include "pair_product.cuh"
#include "pdl.cuh"

constexpr int kChunk = 32, kBlockWarps = EXPERT_WARPS, kBlockThreads = 32 * kBlockWarps;
static_assert(kBlockWarps == kTilePairs, "a warp finishes the rows of a pair");

// Units of a row in flight a lane.
template <class W>
constexpr int kUnroll = sizeof(Unit<W>) > 32 ? 2 : 3;

// The weights of this lane's next units, and where they come from.
template <class W, bool GATED>
struct WeightStream {
    Unit<W> w[kUnroll<W>][2];
    u32 first[2];  // first unit of this lane's rows

    // Rows of pass `pass` of a chunk; past the last row the last one again.
    __device__ __forceinline__ void find(const PairProduct& p, int expert, int chunk, int pass, int units) {
        const int warp = threadIdx.x / 32, bit = threadIdx.x % 2;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            const int row = kChunk * chunk + (GATED ? 2 * kBlockWarps * pass + 2 * warp + bit : 4 * warp + 2 * bit + m);
            first[m] = ((u32)expert * p.rows + min(row, p.rows - 1)) * units;
        }
    }
    __device__ __forceinline__ void load(const PairProduct& p, int i, int unit, int units) {
        if (unit >= units) return;
#pragma unroll
        for (int m = 0; m < 2; ++m) w[i][m].load(p.planes[GATED ? m : 0], first[m] + unit);
    }
};

// Stage the activations of a tile's pairs. Called by all threads; ends with a barrier.
template <class W>
__device__ __forceinline__ void stage_pairs(const PairProduct& p, const ExpertTiles& tiles, const ExpertTile& tile,
                                            const PairRows& x) {
    const int units = p.cols / 32;
    for (int t = 0; t < tile.count; ++t) {
        const size_t row = tiles.order[tile.first + t] / p.pairs_per_row;
        const uint4* q = reinterpret_cast<const uint4*>(p.q + row * p.cols);
        const int2* meta = reinterpret_cast<const int2*>(p.meta + row * units);
        for (int u = threadIdx.x; u < units; u += kBlockThreads) {
            x.q[u * PairRows::kRecord + t] = q[u];
            x.q[u * PairRows::kRecord + kTilePairs + t] = q[units + u];
            x.meta[u * PairRows::kMetaRecord + t] = staged_meta<W>(meta[u]);
        }
    }
    __syncthreads();
}

// In shared memory: of a chunk each pair's sums of its rows, and the sums of each lane's first
// chains, for which there are no registers.
template <bool GATED>
struct ChunkSums {
    float rows[2][kTilePairs][(1 + GATED) * kChunk];
    float chains[2 * kTilePairs][kBlockThreads];
};

// The sums of a chunk's rows for T pairs. `find_next` finds the rows of the next pass or chunk.
template <class W, bool GATED, int T, class Next>
__device__ __forceinline__ void multiply_chunk(const PairProduct& p, WeightStream<W, GATED>& stream, const PairRows& x,
                                               Next find_next, ChunkSums<GATED>& sums, int buffer) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, units = p.cols / 32, l = lane / 2;
    constexpr int kPadded = T <= 2 ? T : T <= 4 ? 4 : 8;  // the butterfly needs a power of two
    constexpr int kPasses = GATED ? kChunk / (2 * kBlockWarps) : 1;
#pragma unroll 1
    for (int pass = 0; pass < kPasses; ++pass) {
        float chain[2][T] = {};
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
#pragma unroll 1
            for (int from = 16 * half + l; from - l < units; from += 32 * kUnroll<W>) {
                int next = from + 32 * kUnroll<W>;
                if (next - l >= units) {
                    next = half == 0 ? 16 + l : l;
                    if (half == 1 || units <= 16) next = l, find_next(pass + 1);
                }
#pragma unroll
                for (int i = 0; i < kUnroll<W>; ++i) {
                    if (from + 32 * i < units) dot_pairs<W, T, 2>(stream.w[i], from + 32 * i, x, chain);
                    stream.load(p, i, next + 32 * i, units);
                }
            }
            if (half == 1) continue;
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int t = 0; t < T; ++t) sums.chains[m * T + t][threadIdx.x] = chain[m][t], chain[m][t] = 0.f;
        }
        float v[2 * kPadded] = {};
        int index = 0;
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int t = 0; t < T; ++t)
                v[m * kPadded + t] = __fadd_rn(sums.chains[m * T + t][threadIdx.x], chain[m][t]);
        const float sum = butterfly(v, index);
        const int m = index / kPadded, bit = lane % 2;
        const int at = GATED ? m * kChunk + 2 * kBlockWarps * pass + 2 * warp + bit : 4 * warp + 2 * bit + m;
        if (!(lane & kCopies<2 * kPadded>)) sums.rows[buffer][index % kPadded][at] = sum;
    }
}

template <class W, bool GATED, bool GELU = false>
__global__ void __launch_bounds__(kBlockThreads, 2)
    grouped_experts(const __grid_constant__ PairProduct p, const ExpertTiles tiles) {
    extern __shared__ __align__(16) u8 shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, units = p.cols / 32;
    ChunkSums<GATED>& sums = *reinterpret_cast<ChunkSums<GATED>*>(shared);
    const PairRows x(shared + sizeof(ChunkSums<GATED>), units);
    // GATED: the predecessor wrote the tiles. The dependent, the same kernel without GATED, reads
    // the tiles before its own wait: they must be complete when it starts, so it is released after
    // this wait.
    if (GATED) grid_dependency_wait();
    ChunkWalk walk(tiles, (p.rows + kChunk - 1) / kChunk);
    WeightStream<W, GATED> stream;
    if (walk.valid()) {
        stream.find(p, walk.tile.expert, walk.chunk, 0, units);
#pragma unroll
        for (int i = 0; i < kUnroll<W>; ++i) stream.load(p, i, lane / 2 + 32 * i, units);
    }
    if (!GATED) grid_dependency_wait();
    for (int staged = -1, buffer = 0; walk.valid(); buffer ^= 1) {
        const ExpertTile tile = walk.tile;
        const int column = kChunk * walk.chunk + lane;
        if (staged != walk.at) stage_pairs<W>(p, tiles, tile, x);
        staged = walk.at;
        // What this warp needs to finish its pair's rows.
        const bool finishes = warp < tile.count;
        const int pair = finishes ? tiles.order[tile.first + warp] : 0;
        float bias[2] = {}, factor = 1.f;
        if (finishes && column < p.rows) {
#pragma unroll
            for (int m = 0; m <= GATED; ++m)
                if (p.bias[m]) bias[m] = __ldg(p.bias[m] + (size_t)tile.expert * p.rows + column);
        }
        if (finishes && GATED && p.factor) factor = p.factor[pair / p.pairs_per_row];
        if (finishes && !GATED) factor = p.weights[pair];
        const int chunk = walk.chunk;
        walk.advance();
        const auto find_next = [&](int pass) {
            if (GATED && pass < kChunk / (2 * kBlockWarps)) stream.find(p, tile.expert, chunk, pass, units);
            else if (walk.valid()) stream.find(p, walk.tile.expert, walk.chunk, 0, units);
        };
        if (tile.count == 1) multiply_chunk<W, GATED, 1>(p, stream, x, find_next, sums, buffer);
        else if (tile.count == 2) multiply_chunk<W, GATED, 2>(p, stream, x, find_next, sums, buffer);
        else if (tile.count == 3) multiply_chunk<W, GATED, 3>(p, stream, x, find_next, sums, buffer);
        else if (tile.count <= 4) multiply_chunk<W, GATED, 4>(p, stream, x, find_next, sums, buffer);
        else if (tile.count <= 6) multiply_chunk<W, GATED, 6>(p, stream, x, find_next, sums, buffer);
        else multiply_chunk<W, GATED, 8>(p, stream, x, find_next, sums, buffer);
        __syncthreads();
        if (!finishes) continue;
        const float sum = sums.rows[buffer][warp][lane];
        if (GATED)
            store_gated<GELU>(p, pair, column, sum, sums.rows[buffer][warp][kChunk * GATED + lane], factor, bias[0], bias[1]);
        else
            store_weighted(p, pair, column, sum, factor, bias[0]);
    }
}
