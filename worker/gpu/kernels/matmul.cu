// Prefill: y[t] = W·x[t] + b + residual[t] on the tensor cores, weights made f16 on their way to shared memory.
//
// A block makes kTokens × kRows of y. Its threads are DEPTHS groups; group g takes steps g, g + DEPTHS, … of 64
// columns: each thread holds its group's next 32 weights in registers while the tensor cores work on the last, so
// weights are read once for every kTokens tokens and never stored as f16. The groups' sums are added in order. Every
// y[t, r] is the same chain of m16n8k16 products whatever else shares the call: its bits depend on token t alone.
// Rows of shared memory are 128 bytes; chunk c of row r lies at c ^ (r & 7), free of bank conflicts.
// x [*, cols] f16, each row with a power of two in scale [*]; y [T, rows] f32. cols is a multiple of 32. kRows is
// 32·COLUMNS. Grid x over rows/kRows, y over tokens/kTokens; 64·COLUMNS·DEPTHS threads; dynamic shared memory
// DEPTHS·2·(kTokens + kRows)·128 bytes. Many rows take <4, 1>, few rows <2, 2>: fewer blocks, each with as many warps.
// EXPERTS: grid y over tiles of slots of one expert each (lists by group_routes.cu); slot s reads x[s / per_slot] and
// writes y[s]; W is [E, rows, cols], b [E, rows]. Twins: `matmul` in worker/cpu/plain.py, worker/cpu/quantized.py.
#include "formats.cuh"
#include "mma.cuh"
#include "tiles.cuh"

constexpr int kTokens = 128, kDepth = 64, kRowBytes = kDepth * 2;

__device__ __forceinline__ int swizzled(int row, int chunk) { return row * kRowBytes + (chunk ^ (row & 7)) * 16; }

// 32 weights in registers.
template <class Block>
struct Slice {
    static constexpr int kUnits = 32 / Unit<Block>::kElements, kWords = Unit<Block>::kElements / 2;
    Unit<Block> units[kUnits];
    __device__ __forceinline__ void load(const Planes& p, u32 u) {
#pragma unroll
        for (int i = 0; i < kUnits; ++i) units[i].load(p, u * kUnits + i);
    }
    __device__ __forceinline__ void store(u32 u, u8* tile, int row, int chunk, bool there) const {
        u32 h[16];
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
            u32 part[kWords];
            units[i].halves(u * kUnits + i, part);
#pragma unroll
            for (int j = 0; j < kWords; ++j) h[i * kWords + j] = there ? part[j] : 0;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
            *reinterpret_cast<uint4*>(tile + swizzled(row, chunk + i)) =
                make_uint4(h[4 * i], h[4 * i + 1], h[4 * i + 2], h[4 * i + 3]);
    }
};

using Accumulator = float[4][4][4];  // 16 tokens, 8 rows, and a lane's four of these 128

// Both tiles of one step into the warp's 64 × 32 of y: every second 16 tokens from `token` on, so that few tokens keep
// as many warps busy as they can. From token `live` on x_tile holds anything: a row of a product sees its own row alone.
__device__ __forceinline__ void multiply(const u8* x_tile, const u8* w_tile, int token, int row, int live,
                                         Accumulator& acc) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, in = lane % 8;
    if (token >= live) return;
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
        u32 b[2][4];
#pragma unroll
        for (int n = 0; n < 2; ++n)
            load_matrices(b[n], w_tile + swizzled(row + 16 * n + (matrix / 2) * 8 + in, 2 * k + matrix % 2));
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            if (token + 32 * m >= live) continue;
            u32 a[4];
            load_matrices(a, x_tile + swizzled(token + 32 * m + (matrix % 2) * 8 + in, 2 * k + matrix / 2));
#pragma unroll
            for (int n = 0; n < 4; ++n) mma_16x8x16(acc[m][n], a, b[n / 2][2 * (n % 2)], b[n / 2][2 * (n % 2) + 1]);
        }
    }
}

struct Product {
    Planes planes;
    const float* bias;      // [rows] or null
    const float* residual;  // [T, rows] or null
    float* out;             // [T, rows]
    int rows, cols;
};

struct Scope {  // what a block works on
    Tile tile;
    int row0;
    int slots[kTokens];
    u32 x_rows[kTokens];  // where each token's row of x begins
};

// One group's steps: its part of acc. A step past the last adds zeros.
template <class Block, int COLUMNS, int DEPTHS>
__device__ __forceinline__ void accumulate(const Product& p, const u16* x, const Scope& scope, u8* tiles,
                                           Accumulator& acc) {
    constexpr int kThreads = 64 * COLUMNS, kRows = 32 * COLUMNS, kChunks = kTokens * 8 / kThreads;
    constexpr int kXTile = kTokens * kRowBytes, kWTile = kRows * kRowBytes;
    const int group = threadIdx.x / kThreads, thread = threadIdx.x % kThreads, warp = thread / 32, slices = p.cols / 32;
    u8* const x_tiles = tiles + group * 2 * (kXTile + kWTile);
    u8* const w_tiles = x_tiles + 2 * kXTile;
    const auto fetch_x = [&](int step, int stage) {
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            const int at = thread + i * kThreads, token = at / 8, chunk = at % 8, column = step * kDepth + chunk * 8;
            const bool there = column < p.cols;
            u8* to = x_tiles + stage * kXTile + swizzled(token, chunk);
            if (token < scope.tile.count) copy_16_async(to, x + scope.x_rows[token] + (there ? column : 0), there);
        }
        commit_copies();
    };
    const int w_row = thread / 2, w_half = thread % 2;
    const u32 base = ((u32)scope.tile.expert * p.rows + min(scope.row0 + w_row, p.rows - 1)) * slices;
    const auto slice_at = [&](int step) { return base + min(2 * step + w_half, slices - 1); };
    const int steps = (slices + 1) / 2;
    Slice<Block> weights;
    fetch_x(group, 0);
    weights.load(p.planes, slice_at(group));
    for (int first = 0, stage = 0; first < steps; first += DEPTHS, stage ^= 1) {
        const int step = first + group;
        weights.store(slice_at(step), w_tiles + stage * kWTile, w_row, w_half * 4, 2 * step + w_half < slices);
        wait_for_copies<0>();
        __syncthreads();  // after it nobody reads the tiles of the step before
        if (first + DEPTHS < steps) {
            fetch_x(step + DEPTHS, stage ^ 1);
            weights.load(p.planes, slice_at(step + DEPTHS));
        }
        multiply(x_tiles + stage * kXTile, w_tiles + stage * kWTile, warp / COLUMNS * 16, warp % COLUMNS * 32,
                 scope.tile.count, acc);
    }
}

// Adds the groups' parts in order: group 0's threads have the sums.
template <int COLUMNS, int DEPTHS>
__device__ __forceinline__ void add_groups(float* scratch, Accumulator& acc) {
    constexpr int kThreads = 64 * COLUMNS;
    float* const flat = &acc[0][0][0];
#pragma unroll
    for (int g = 1; g < DEPTHS; ++g) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 64; ++i) {
            float& mine = scratch[i * kThreads + threadIdx.x % kThreads];
            if ((int)threadIdx.x / kThreads == g) mine = flat[i];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 64; ++i)
            if (threadIdx.x < kThreads) flat[i] += scratch[i * kThreads + threadIdx.x];
    }
}

__device__ __forceinline__ void write(const Product& p, const Scope& scope, const float* scale, int per_slot, int token,
                                      int row, const Accumulator& acc) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            const int i = token + 32 * m + 8 * part + lane / 4;
            if (i >= scope.tile.count) continue;
            const int slot = scope.slots[i];
            const float s = scale[slot / per_slot];
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                const int r = row + 8 * (n / 2) + 2 * (lane % 4) + n % 2;
                if (r >= p.rows) continue;
                float y = acc[m][n / 2][2 * part + n % 2] * s;
                if (p.bias) y += p.bias[(size_t)scope.tile.expert * p.rows + r];
                if (p.residual) y += p.residual[(size_t)slot * p.rows + r];
                p.out[(size_t)slot * p.rows + r] = y;
            }
        }
}

// f32 weights need more registers than two blocks a multiprocessor leave.
template <class Block>
constexpr int kBlocks = Unit<Block>::kElements == 4 ? 1 : 2;

template <class Block, int COLUMNS, int DEPTHS, bool EXPERTS>
__global__ void __launch_bounds__(64 * COLUMNS * DEPTHS, kBlocks<Block>)
    matmul(const Product p, const u16* __restrict__ x, const float* __restrict__ scale, const int tokens,
           const Tiles tiles) {
    constexpr int kThreads = 64 * COLUMNS;
    extern __shared__ __align__(128) u8 shared[];
    __shared__ Scope scope;
    const int per_slot = EXPERTS ? tiles.per_slot : 1, first = blockIdx.y * kTokens;
    const Tile tile = EXPERTS ? tiles.table[blockIdx.y] : Tile{0, first, min(kTokens, tokens - first)};
    if (tile.count <= 0) return;
    if (threadIdx.x == 0) scope.tile = tile, scope.row0 = blockIdx.x * 32 * COLUMNS;
    for (int i = threadIdx.x; i < kTokens; i += kThreads * DEPTHS) {
        const int at = tile.first + min(i, tile.count - 1), slot = EXPERTS ? tiles.order[at] : at;
        scope.slots[i] = slot;
        scope.x_rows[i] = (u32)(slot / per_slot) * p.cols;
    }
    __syncthreads();
    Accumulator acc = {};
    accumulate<Block, COLUMNS, DEPTHS>(p, x, scope, shared, acc);
    add_groups<COLUMNS, DEPTHS>(reinterpret_cast<float*>(shared), acc);
    const int warp = threadIdx.x / 32;
    if (threadIdx.x < kThreads)
        write(p, scope, scale, per_slot, warp / COLUMNS * 16, scope.row0 + warp % COLUMNS * 32, acc);
}
