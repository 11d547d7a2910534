// Prefill: y[t] = W·x[t] + b + residual[t] on the tensor cores, weights made f16 in registers, each by one warp a tile.
//
// W is A and x is B of m16n8k16 products: a warp makes STRIPS·16 rows × TOKENS of y, or with GLU half as many of a gate and
// the same ones of its twin `up`, gated where they lie. A block is ROWS warps side by side, DEPTHS times, and takes TURNS; of
// these DEPTHS·TURNS groups g takes steps g, g + DEPTHS·TURNS, … of 128 columns (group_sums.cuh: the order in which they add).
// A lane loads whole units of its 2·STRIPS rows straight from global memory, the next ones while the tensor cores work on the
// last (fragments.cuh has the order), so weights never pass through shared memory; x does, by cp.async, a step or two ahead.
// Every y[t, r] is the same chain of products whatever else shares the call: its bits depend on token t alone.
// x [*, padded cols] f16, each row with a power of two in scale [*] (null: 1); y [T, rows] f32; of the T tokens the first
// *count are real (null: all), the others' results are left alone. cols is a multiple of 32. Grid x over rows of up to
// three projections of one x, y over tokens/TOKENS; 32·ROWS·DEPTHS threads; dynamic shared memory 256·(ahead + 1)·TOKENS·
// DEPTHS bytes, a row of 256 with its 16-byte chunk c at c ^ (row & 7), free of bank conflicts, and with turns what they
// keep, 64·STRIPS·ROWS·TOKENS·DEPTHS. The first weights of a dense matrix are on their way before x is there (pdl.cuh).
// Last is the third projection's type where the first two have another. EXPERTS: grid y over tiles of slots of one expert each
// (lists by group_routes.cu); slot s reads x[s / per_slot] and writes y[s]; W is [E, rows, cols], b [E, rows].
// Twins: `matmul`, `gated` in worker/cpu/plain.py, worker/cpu/quantized.py.
#include "pdl.cuh"
#include "fragments.cuh"
#include "group_sums.cuh"
#include "mma.cuh"
#include "product.cuh"

constexpr int kRowBytes = 2 * kGroup, kSteps = kGroup / 16;  // products of a step

// Steps whose weights and x are on their way beside the one in hand: small tiles work less than a load takes.
__host__ __device__ constexpr int ahead(int tokens, int depths) { return tokens > 32 || depths > 4 ? 1 : 2; }

// A lane's rows of weights (two of each strip): where they begin, and a unit of each.
template <class Block, int STRIPS, bool GLU>
struct Weights {
    static constexpr int kParts = 32 / Unit<Block>::kElements;  // of a lane's 32 columns of a step
    u32 rows[2 * STRIPS], slices;

    __device__ __forceinline__ Weights(const Part* parts, int cols, int expert, int row0) : slices(cols / 32) {
#pragma unroll
        for (int i = 0; i < 2 * STRIPS; ++i) {
            const int row = row0 + 8 * (GLU ? i % STRIPS : i) + threadIdx.x % 32 / 4;
            rows[i] = ((u32)expert * parts->rows + min(row, parts->rows - 1)) * slices;
        }
    }
    __device__ __forceinline__ u32 unit(int i, int step, int part) const {
        return (rows[i] + min(4 * step + threadIdx.x % 4, slices - 1)) * kParts + part;  // past the end x is zero
    }
    __device__ __forceinline__ void load(const Part* parts, int step, int part, Unit<Block> (&units)[2 * STRIPS]) const {
#pragma unroll
        for (int i = 0; i < 2 * STRIPS; ++i) units[i].load(parts[GLU ? i / STRIPS : 0].planes, unit(i, step, part));
    }
    // The first of AHEAD becomes `now`, the others move up, and the last is loaded.
    template <int AHEAD>
    __device__ __forceinline__ void turn(const Part* parts, int step, int part, Unit<Block> (&now)[2 * STRIPS],
                                         Unit<Block> (&next)[AHEAD][2 * STRIPS]) const {
#pragma unroll
        for (int i = 0; i < 2 * STRIPS; ++i) {
            now[i] = next[0][i];
#pragma unroll
            for (int a = 1; a < AHEAD; ++a) next[a - 1][i] = next[a][i];
        }
        load(parts, step, part, next[AHEAD - 1]);
    }
};

// acc += weights·x over the columns of one part of a step. From token `live` on lies no token: a column of a product sees
// its own column alone. FULL: taken as if all were there, and nothing branches.
template <bool FULL, class Block, int STRIPS, int TOKENS, bool GLU>
__device__ __forceinline__ void multiply(const Weights<Block, STRIPS, GLU>& weights,
                                         const Unit<Block> (&units)[2 * STRIPS], int step, int part, u32 x_lane, int live,
                                         Accumulator<STRIPS, TOKENS>& acc) {
    constexpr int kProducts = kSteps / Weights<Block, STRIPS, GLU>::kParts;
#pragma unroll
    for (int k = 0; k < kProducts; ++k) {
        u32 a[STRIPS][4];
#pragma unroll
        for (int i = 0; i < 2 * STRIPS; ++i) {
            u32 h[2 * kProducts];  // of which this product takes two
            units[i].halves(weights.unit(i, step, part), h);
            a[i / 2][i % 2] = h[2 * k], a[i / 2][i % 2 + 2] = h[2 * k + 1];
        }
#pragma unroll
        for (int n = 0; n < TOKENS / 16; ++n) {
            if (!FULL && 16 * n >= live) break;
            u32 b[4];
            load_matrices(b, (x_lane ^ (32 * (part * kProducts + k))) + n * 16 * kRowBytes);
#pragma unroll
            for (int m = 0; m < STRIPS; ++m) {
                mma_16x8x16(acc[m][2 * n], a[m], b[0], b[1]);
                mma_16x8x16(acc[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// One group's steps: its part of acc. `await` is called between the first weights' way here and that of x.
template <bool FULL, class Block, int ROWS, int DEPTHS, int TURNS, int TOKENS, bool GLU, int STRIPS, class Await>
__device__ __forceinline__ void accumulate(const Part* parts, int cols, const u16* x, const Scope<TOKENS>& scope, int row0,
                                           int turn, u8* tiles, Accumulator<STRIPS, TOKENS>& acc, Await await) {
    constexpr int kThreads = 32 * ROWS, kTile = TOKENS * kRowBytes, kParts = Weights<Block, STRIPS, GLU>::kParts;
    constexpr int kAhead = ahead(TOKENS, DEPTHS), kStages = kAhead + 1, kGroups = DEPTHS * TURNS;
    const int depth = threadIdx.x / kThreads, thread = threadIdx.x % kThreads, lane = threadIdx.x % 32;
    const int steps = (cols + kGroup - 1) / kGroup, live = scope.tile.count, group = depth * TURNS + turn;
    const u32 own = (u32)__cvta_generic_to_shared(tiles) + depth * kStages * kTile;
    constexpr int kApart = kThreads / 16;  // tokens between a thread's copies, a power of two above its first
    static_assert(TOKENS % kApart == 0, "each thread copies as much as the others");
    const int token0 = thread / 16, chunk = thread % 16;
    const u32 to = own + token0 * kRowBytes + (chunk ^ (token0 & 7)) * 16;
    const auto fetch_x = [&](int step, int stage) {
        const u16* const from = x + step * kGroup + chunk * 8;
#pragma unroll
        for (int i = 0; step < steps && i < TOKENS / kApart; ++i) {
            const u32 at = (to ^ (kApart * i & 7) * 16) + stage * kTile + i * kApart * kRowBytes;
            if (FULL || token0 + i * kApart < live) copy_16_async(at, from + scope.x_rows[token0 + i * kApart], true);
        }
        commit_copies();
    };
    const Weights<Block, STRIPS, GLU> weights(parts, cols, scope.tile.expert, row0);
    // The weights of the i-th part from here, of the last step where the columns end before it.
    const auto step_of = [&](int i) { return min(group + kGroups * (i / kParts), steps - 1); };
    Unit<Block> now[2 * STRIPS], next[kAhead][2 * STRIPS];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) weights.load(parts, step_of(a), a % kParts, next[a]);
    await(turn);
#pragma unroll
    for (int a = 0; a < kAhead; ++a) fetch_x(group + kGroups * a, a);
    const int in_tile = (lane / 16 * 8 + lane % 8) * kRowBytes + ((lane / 8 % 2) ^ (lane % 8)) * 16;
    for (int first = 0, stage = 0, at = 0; first < steps; first += kGroups, stage = stage == kAhead ? 0 : stage + 1) {
        const int step = first + group;
        wait_for_copies<kAhead - 1>();
        __syncthreads();  // after it nobody reads the tile of the step before
        fetch_x(step + kGroups * kAhead, stage == 0 ? kAhead : stage - 1);
        if (step >= steps) continue;
        const u32 x_lane = own + stage * kTile + in_tile;
#pragma unroll 1
        for (int part = 0; part < kParts; ++part, ++at) {
            weights.turn(parts, step_of(at + kAhead), (part + kAhead) % kParts, now, next);
            multiply<FULL, Block, STRIPS, TOKENS, GLU>(weights, now, step, part, x_lane, live, acc);
        }
    }
}

// y of `TOKENS` tokens from `token0` on; a lane's rows are lane/4 and each 8 below, its tokens neighbours.
template <int ALL, int STRIPS, int TOKENS, bool GLU>
__device__ __forceinline__ void write(const Product& p, const Part* parts, const Scope<ALL>& scope, int token0, int row0,
                                      const Accumulator<STRIPS, TOKENS>& sums) {
    constexpr int kRows = GLU ? STRIPS : 2 * STRIPS, kUp = GLU ? STRIPS : 0;
    const int lane = threadIdx.x % 32, rows = parts->rows, r = row0 + lane / 4, there = (rows - r + 7) / 8;  // of r, r + 8, …
    float bias[2 * STRIPS];
#pragma unroll
    for (int i = 0; i < 2 * STRIPS; ++i) {
        const float* from = parts[i / kRows].bias;
        const size_t at = (size_t)scope.tile.expert * rows + r + i % kRows * 8;
        bias[i] = from && i % kRows < there ? from[at] : 0.f;
    }
#pragma unroll
    for (int n = 0; n < TOKENS / 8; ++n) {
        float kept[2][kRows];  // all of the residual before any result: loads that wait for one another take the longest
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int token = token0 + 8 * n + lane % 4 * 2 + j;
            const float* from = p.residual + (size_t)scope.slots[token] * rows + r;
#pragma unroll
            for (int i = 0; i < kRows; ++i) kept[j][i] = p.residual && i < there ? from[8 * i] : 0.f;
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int token = token0 + 8 * n + lane % 4 * 2 + j;
            const bool real = token < scope.tile.count;
            const float s = scope.scales[token];
            float* to = parts->out + (size_t)scope.slots[token] * rows + r;
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                float y = sums[i / 2][n][i % 2 * 2 + j] * s + bias[i];
                if (GLU) y = gated(y, sums[(kUp + i) / 2][n][(kUp + i) % 2 * 2 + j] * s + bias[kUp + i], p.gate);
                if (real && i < there) to[8 * i] = y + kept[j][i];
            }
        }
    }
}

// Blocks of a multiprocessor, 0 for as many as come: small tiles of experts wait for weights, so loads in flight count. The
// code for sm_100 takes more registers than four blocks leave.
template <class Block>
__host__ __device__ constexpr int blocks_of(int tokens, bool experts) {
#if __CUDA_ARCH__ >= 1000
    return 0;
#else
    return experts && tokens <= 32 && sizeof(Unit<Block>) <= 32 ? 4 : 0;
#endif
}

// A block's part of y: rows of `parts` from `row0` on by this warp, the tokens that `scope` names.
template <class Block, int STRIPS, int ROWS, int DEPTHS, int TURNS, int TOKENS, bool GLU, class Await>
__device__ __forceinline__ void product(const Product& p, const Part* parts, const u16* x, const Scope<TOKENS>& scope,
                                        int row0, u8* shared, Await await) {
    Accumulator<STRIPS, TOKENS> acc = {};
    constexpr bool kLarge = TOKENS > 64;  // such a tile has no registers left for branches
    float4* const kept = reinterpret_cast<float4*>(shared + kRowBytes * (ahead(TOKENS, DEPTHS) + 1) * TOKENS * DEPTHS);
    for (int turn = 0;;) {
        if (kLarge || scope.tile.count > TOKENS - 16)
            accumulate<true, Block, ROWS, DEPTHS, TURNS, TOKENS, GLU>(parts, p.cols, x, scope, row0, turn, shared, acc, await);
        else
            accumulate<kLarge, Block, ROWS, DEPTHS, TURNS, TOKENS, GLU>(parts, p.cols, x, scope, row0, turn, shared, acc,
                                                                        await);
        if constexpr (TURNS == 1) break;
        keep<TURNS, 32 * ROWS * DEPTHS>(kept + threadIdx.x, turn, acc);
        if (++turn == TURNS) break;
        __syncthreads();  // nobody reads x of this turn any more
    }
    if constexpr (DEPTHS == 1) {
        write<TOKENS, STRIPS, TOKENS, GLU>(p, parts, scope, 0, row0, acc);
    } else {
        constexpr int kShare = share_of(TOKENS, DEPTHS);
        const int token0 = threadIdx.x / 32 / ROWS * kShare;
        Accumulator<STRIPS, kShare> sums;
        add_depths<ROWS, DEPTHS, STRIPS, TOKENS, kShare>(reinterpret_cast<float4*>(shared), acc, sums);
        if (token0 < TOKENS) write<TOKENS, STRIPS, kShare, GLU>(p, parts, scope, token0, row0, sums);
    }
}

template <class Block, int STRIPS, int ROWS, int DEPTHS, int TURNS, int TOKENS, bool EXPERTS, bool GLU, class Last = Block>
__global__ void __launch_bounds__(32 * ROWS * DEPTHS, blocks_of<Block>(TOKENS, EXPERTS))
    matmul(const __grid_constant__ Product p, const u16* __restrict__ x, const int tokens, const Tiles tiles) {
    extern __shared__ __align__(256) u8 shared[];
    __shared__ Scope<TOKENS> scope;
    const int per_slot = EXPERTS ? tiles.per_slot : 1, first = blockIdx.y * TOKENS;
    if (EXPERTS) grid_dependency_wait();
    const Tile tile = EXPERTS ? tiles.table[blockIdx.y]
                              : Tile{0, first, min(TOKENS, (p.count ? *p.count : tokens) - first)};
    if (tile.count <= 0) return;
    if (threadIdx.x == 0) scope.tile = tile;
    for (int i = threadIdx.x; i < TOKENS; i += 32 * ROWS * DEPTHS) {
        const int at = tile.first + min(i, tile.count - 1), slot = EXPERTS ? tiles.order[at] : at;
        scope.slots[i] = slot;
        scope.x_rows[i] = (u32)(slot / per_slot) * padded(p.cols);
    }
    __syncthreads();
    const auto await = [&](int turn) {
        if (turn > 0) return;
        if (!EXPERTS) grid_dependency_wait();
        for (int i = threadIdx.x; i < TOKENS; i += 32 * ROWS * DEPTHS)
            scope.scales[i] = p.scale ? p.scale[scope.slots[i] / per_slot] : 1.f;
    };
    const Part* parts = p.parts;
    if (!GLU && !EXPERTS) parts += (blockIdx.x >= p.parts[1].first) + (blockIdx.x >= p.parts[2].first);
    const int warp = threadIdx.x / 32, row0 = ((blockIdx.x - parts->first) * ROWS + warp % ROWS) * (GLU ? 8 : 16) * STRIPS;
    if (kSame<Block, Last> || parts != p.parts + 2)
        product<Block, STRIPS, ROWS, DEPTHS, TURNS, TOKENS, GLU>(p, parts, x, scope, row0, shared, await);
    else
        product<Last, STRIPS, ROWS, DEPTHS, TURNS, TOKENS, GLU>(p, parts, x, scope, row0, shared, await);
}
