// Prefill on sm_90: y[t] = W·x[t] + b + residual[t] on tensor cores by `wgmma`; each weight is
// converted to f16 in registers once a tile.
//
// W is A, from registers, and x is B, from shared memory, of m64nNk16 MMAs. A tile is 128 rows
// (with GLU 64 of a gate and the same 64 of its `up`) × TILE_N tokens of y: a block has two
// warpgroups with half of the rows each, and a producer that copies panels of 64 columns of x by a
// tensor map into a ring of STAGES. Barriers count a panel's bytes, and the warps that have read
// it. A block of a dense matrix computes its tiles one after another, and the producer copies the
// panels of the next one during the epilogue. A lane loads whole units of its two rows of weights a
// step of 128 columns ahead, and converts a panel's while the tensor cores work on the panel before
// (column order:
// fragments.cuh).
// Each y[t, r] is one chain of MMAs over ascending columns, whatever TILE_N and whatever else is in
// the launch: its bits depend on token t alone. matmul_wgmma_short.cu computes the same chain.
// Fragments must be computed values: not F16, whose fragments would be the loaded registers, which
// the compiler overwrites while MMAs read them.
// Shapes, projections, Last, *count: as in matmul.cu; x as a tensor map of [T, padded cols] in
// boxes of TILE_N rows × 64 columns with SWIZZLE_128B.
// EXPERTS: as in matmul.cu, with a table of tiles (slot_tiles.cuh); the MMAs of a block have as few
// columns as hold its rows.
// Grid: x over the tiles of TileGrid, of which a block takes every gridDim.x-th, with EXPERTS one;
// 384 threads.
// Alignment: planes, x, y, biases and residual 16 bytes. Dynamic shared memory: 128·TILE_N·STAGES +
// 1,024 bytes.
// Bytes: weights once a tile of tokens, x once a tile of rows.
// Twins: `matmul`, `gated` in worker/cpu/plain.py; tests/quantized_ops.py. Launcher:
// worker/gpu/matmul_wgmma.py.
#include "pdl.cuh"
#include "wgmma_tile.cuh"
#include "staged_write.cuh"

constexpr int kConsumers = 256;          // threads that multiply; the producer's warpgroup follows
constexpr int kPanelMmas = kPanel / 16;  // MMAs of a panel

// The tiles of a launch: those of the rows of up to three projections of one x, for each tile of
// tokens or of the table.
struct TileGrid {
    int row_tiles, token_tiles;
};

// The stage of the next panel, and the parity of its phase: they go on from tile to tile.
template <int STAGES>
struct RingPosition {
    int stage = 0, parity = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// The producer: copy the panels of the tokens from `first` on.
template <int TILE_N, int STAGES>
__device__ __forceinline__ void fill(const Stages<STAGES>& ring, RingPosition<STAGES>& at, const TensorMap& x, int n_panels,
                                     int first) {
    for (int i = 0; i < n_panels; ++i, at.advance()) {
        wait_for_phase(ring.empty(at.stage), at.parity ^ 1);
        expect_bytes(ring.full(at.stage), TILE_N * kPanelBytes);
        copy_box(ring.memory + at.stage * TILE_N * kPanelBytes, x, i * kPanel, first, ring.full(at.stage));
    }
}

// The fragments of A of panel HALF of a step, from a lane's 32 columns of two rows.
template <int HALF, class Block, int GLU, int UNITS>
__device__ __forceinline__ void to_fragments(const WeightIterator<Block, 1, GLU>& weights, const Unit<Block> (&units)[UNITS][2],
                                             int step, u32 (&a)[kPanelMmas][4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        u32 h[16];
        to_half2(weights, units, i, step, h);
#pragma unroll
        for (int s = 0; s < kPanelMmas; ++s) {
            const int pair = 8 * HALF + 2 * s;
            a[s][i] = h[pair], a[s][i + 2] = h[pair + 1];
        }
    }
}

// acc += the product of a warpgroup's rows and the first 8·FRAGS_N tokens of the tile, whose first
// panel is at `at`, which advances to the next tile's. `wait_for_x` is
// called after the first loads of weights.
template <class Block, int TILE_N, int STAGES, int GLU, int FRAGS_N, class Wait>
__device__ __forceinline__ void accumulate(const Projection* projections, int cols, int expert, int row0,
                                           const Stages<STAGES>& ring, RingPosition<STAGES>& at,
                                           float (&acc)[1][FRAGS_N][4], Wait wait_for_x) {
    using Weights = WeightIterator<Block, 1, GLU>;
    const int steps = (cols + kColumnGroup - 1) / kColumnGroup;
    const Weights weights(projections, cols, expert, row0);
    Unit<Block> current[Weights::kUnits][2], next[Weights::kUnits][2];
    const auto load_next = [&](int step) {
#pragma unroll
        for (int k = 0; k < Weights::kUnits; ++k) weights.load(projections, min(step, steps - 1), k, next[k]);
    };
    load_next(0);
    wait_for_x();
    u32 a[2][kPanelMmas][4];
    const auto multiply_panel = [&](u32 (&fragments)[kPanelMmas][4]) {
        wait_for_phase(ring.full(at.stage), at.parity);
#pragma unroll
        for (int s = 0; s < kPanelMmas; ++s) settle(fragments[s]);
        begin_mmas();
#pragma unroll
        for (int s = 0; s < kPanelMmas; ++s)
            mma_64xNx16(acc[0], fragments[s], descriptor(ring.memory + at.stage * TILE_N * kPanelBytes + 32 * s));
        commit_mmas();
        at.advance();
    };
    const auto release_panel = [&](int distance) {  // the one that many panels before the next
        const int stage = at.stage - distance;
        if (threadIdx.x % 32 == 0) arrive(ring.empty(stage < 0 ? stage + STAGES : stage), 1);
    };
    to_fragments<0>(weights, next, 0, a[0]);
#pragma unroll
    for (int n = 0; n < FRAGS_N; ++n) settle(acc[0][n]);
    begin_mmas();
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
#pragma unroll
        for (int k = 0; k < 2 * Weights::kUnits; ++k) current[k / 2][k % 2] = next[k / 2][k % 2];
        load_next(step + 1);
        multiply_panel(a[0]);
        wait_for_mmas<1>();  // the MMAs of the panel before are complete: its stage and registers are free
        if (step > 0) release_panel(2);
        to_fragments<1>(weights, current, step, a[1]);
        multiply_panel(a[1]);
        wait_for_mmas<1>();
        release_panel(2);
        to_fragments<0>(weights, next, min(step + 1, steps - 1), a[0]);
    }
    wait_for_mmas<0>();
#pragma unroll
    for (int n = 0; n < FRAGS_N; ++n) settle(acc[0][n]);
    release_panel(1);
}

// The tile of y of a warpgroup's rows, with MMAs of the fewest columns, from WIDTH on, that hold
// its tokens. `row_tile` counts those of all projections.
template <class Block, class Last, int TILE_N, int WIDTH, int STAGES, bool EXPERTS, int GLU>
__device__ __forceinline__ void compute_tile(const MatmulParams& p, const SlotTiles& tiles, int row_tile, const SlotTile& tile,
                                             const Stages<STAGES>& ring, RingPosition<STAGES>& at, TokenTile<TILE_N>& tokens,
                                             StagedRows& staged) {
    if constexpr (WIDTH < TILE_N) {
        constexpr int kWider = WIDTH < 192 ? WIDTH + 32 : 256;
        if (tile.count > WIDTH)
            return compute_tile<Block, Last, TILE_N, kWider, STAGES, EXPERTS, GLU>(p, tiles, row_tile, tile, ring, at, tokens,
                                                                                   staged);
    }
    const Projection* projections = projection_of<GLU>(p, row_tile);
    const int row0 = ((row_tile - projections->first_block) * 8 + threadIdx.x / 32) * (GLU ? 8 : 16);
    Accumulator<1, WIDTH> acc = {};
    const auto wait_for_x = [&] {
        grid_dependency_wait();
        wait_for_group();  // until every warp has written its previous tile, whose tokens are replaced
        read_tokens<128>(p, tiles, tile, tokens);
    };
    if (kSame<Block, Last> || projections != p.projections + 2)
        accumulate<Block, TILE_N, STAGES, GLU>(projections, p.cols, tile.expert, row0, ring, at, acc, wait_for_x);
    else
        accumulate<Last, TILE_N, STAGES, GLU>(projections, p.cols, tile.expert, row0, ring, at, acc, wait_for_x);
    wait_for_group();
    if (GLU || !EXPERTS && p.residual)  // without either, `write` is as fast
        write_staged<TILE_N, WIDTH, GLU>(p, projections, tokens, row0, acc, staged);
    else
        write<TILE_N, 1, WIDTH, GLU>(p, projections, tokens, 0, row0, acc);
}

// Call `compute` with the row tile and the tokens of each tile of this block. Only the last tiles
// are empty.
template <int TILE_N, bool EXPERTS, class Compute>
__device__ __forceinline__ void for_each_tile(const MatmulParams& p, const SlotTiles& tiles, const TileGrid& grid, int n_tokens,
                                              Compute compute) {
    for (int i = blockIdx.x; i < grid.row_tiles * grid.token_tiles; i += gridDim.x) {
        const SlotTile tile = token_tile<TILE_N>(p, tiles, n_tokens, i / grid.row_tiles);
        if (tile.count <= 0) return;
        compute(i % grid.row_tiles, tile);
        if (EXPERTS) return;  // the loop would take registers that their MMAs need
    }
}

template <class Block, int TILE_N, int STAGES, bool EXPERTS, int GLU, class Last = Block>
__global__ void __launch_bounds__(kConsumers + 128, 1)
    matmul_wgmma(const __grid_constant__ MatmulParams p, const __grid_constant__ TensorMap x, const int n_tokens,
                 const SlotTiles tiles, const TileGrid grid) {
    extern __shared__ u8 shared[];
    __shared__ TokenTile<TILE_N> tokens[kConsumers / 128];
    __shared__ StagedRows staged[kConsumers / 32];
    __shared__ unsigned long long barriers[2 * STAGES];
    const Stages<STAGES> ring(shared, barriers);
    if (threadIdx.x == 0) ring.init(1, kConsumers / 32);
    __syncthreads();
    RingPosition<STAGES> at;
    if (threadIdx.x >= kConsumers) {
        lower_registers<24>();
        grid_dependency_wait();
        if (threadIdx.x == kConsumers)
            for_each_tile<TILE_N, EXPERTS>(p, tiles, grid, n_tokens, [&](int, const SlotTile& tile) {
                fill<TILE_N>(ring, at, x, padded(p.cols) / kPanel, tile.first);
            });
    } else {
        raise_registers<240>();
        constexpr int kWidth = EXPERTS ? 64 : TILE_N;
        for_each_tile<TILE_N, EXPERTS>(p, tiles, grid, n_tokens, [&](int row_tile, const SlotTile& tile) {
            compute_tile<Block, Last, TILE_N, kWidth, STAGES, EXPERTS, GLU>(
                p, tiles, row_tile, tile, ring, at, tokens[threadIdx.x / 128], staged[threadIdx.x / 32]);
        });
    }
}
