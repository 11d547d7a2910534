// Prefill on sm_90: y[t] = W·x[t] + b + residual[t] on tensor cores by `wgmma`; each weight is
// converted to f16 in registers once a tile.
//
// W is A, from registers, and x is B, from shared memory, of m64nNk16 MMAs (wgmma_ring.cuh). A tile
// is 128 rows (with GLU 64 of a gate and the same 64 of its `up`) × TILE_N tokens of y: a block has
// two warpgroups with half of the rows each, and a producer that copies panels of x. A block of a
// dense matrix computes its tiles one after another, and the producer copies the panels of the next
// one during the epilogue.
// Each y[t, r] is one chain of MMAs over ascending columns, whatever TILE_N and whatever else is in
// the launch: its bits depend on token t alone. matmul_wgmma_short.cu computes the same chain.
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
#include "staged_write.cuh"
#include "wgmma_ring.cuh"

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
        accumulate<TILE_N>(WeightIterator<Block, 1, GLU>(projections, p.cols, tile.expert, row0), projections, p.cols, ring, at, acc,
                           wait_for_x);
    else
        accumulate<TILE_N>(WeightIterator<Last, 1, GLU>(projections, p.cols, tile.expert, row0), projections, p.cols, ring, at, acc,
                           wait_for_x);
    wait_for_group();
    if (GLU || !EXPERTS && p.residual)  // without either, `write` is as fast
        write_staged<TILE_N, WIDTH, GLU>(p, projections, tokens, row0, acc, staged);
    else
        write<TILE_N, 1, WIDTH, GLU>(p, projections, tokens, 0, row0, acc);
}

template <class Block, int TILE_N, int STAGES, bool EXPERTS, int GLU, class Last = Block>
__global__ void __launch_bounds__(kConsumers + 128, 1)
    matmul_wgmma(const __grid_constant__ MatmulParams p, const __grid_constant__ TensorMap x, const int n_tokens,
                 const SlotTiles tiles, const TileGrid grid) {
    extern __shared__ u8 shared[];
    __shared__ TokenTile<TILE_N> tokens[kConsumers / 128];
    __shared__ StagedRows staged[kConsumers / 32];
    constexpr int kWidth = EXPERTS ? 64 : TILE_N;
    run<TILE_N, STAGES, EXPERTS>(
        shared, p, x, tiles, grid, n_tokens,
        [&](const Stages<STAGES>& ring, RingPosition<STAGES>& at, int row_tile, const SlotTile& tile) {
            compute_tile<Block, Last, TILE_N, kWidth, STAGES, EXPERTS, GLU>(
                p, tiles, row_tile, tile, ring, at, tokens[threadIdx.x / 128], staged[threadIdx.x / 32]);
        });
}
