// What wgmma_ring.cuh and matmul_wgmma_short.cu share: the tokens of a block, and weights of a
// step.
#pragma once
#include "pdl.cuh"
#include "stages.cuh"
#include "wgmma.cuh"
#include "matmul_tile.cuh"

constexpr int kPanel = 64, kPanelBytes = 2 * kPanel;  // columns of a panel, and bytes of its rows

// The tokens of token tile `index`, or the rows of its expert. *count is read before the wait
// (pdl.cuh):
// no kernel writes it; the table is read after it.
template <int TILE_N>
__device__ __forceinline__ SlotTile token_tile(const MatmulParams& p, const SlotTiles& tiles, int n_tokens, int index) {
    const int first = index * TILE_N;
    if (!tiles.table) return {0, first, min(TILE_N, (p.count ? *p.count : n_tokens) - first)};
    grid_dependency_wait();
    return tile_of<TILE_N>(tiles, index);
}

// Fill in `tokens`. THREADS adjacent threads, whole warpgroups, call it after the wait, and
// `wait_for_group` before they read them.
template <int THREADS, int TILE_N>
__device__ __forceinline__ void read_tokens(const MatmulParams& p, const SlotTiles& tiles, const SlotTile& tile,
                                            TokenTile<TILE_N>& tokens) {
    if (threadIdx.x % THREADS == 0) tokens.tile = tile;
    for (int i = threadIdx.x % THREADS; i < TILE_N; i += THREADS) {
        const int row = tile.first + min(i, tile.count - 1);
        tokens.slots[i] = tiles.order ? tiles.order[row] : row;
        tokens.scales[i] = p.scale ? p.scale[row] : 1.f;
        if (p.h_scale) tokens.h_inverses[i] = __frcp_rn(p.h_scale[row]);
    }
}
// Wait for the other threads of this warpgroup.
__device__ __forceinline__ void wait_for_group() {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + threadIdx.x / 128), "n"(128) : "memory");
}

// The projection of a row tile, or gate and up.
template <int GLU>
__device__ __forceinline__ const Projection* projection_of(const MatmulParams& p, int row_tile) {
    return GLU ? p.projections : p.projections + (row_tile >= p.projections[1].first_block) + (row_tile >= p.projections[2].first_block);
}

// A lane's 32 columns of a step of row i as pairs of f16.
template <class Block, int GLU, int UNITS>
__device__ __forceinline__ void to_half2(const WeightIterator<Block, 1, GLU>& weights, const Unit<Block> (&units)[UNITS][2],
                                         int i, int step, u32 (&h)[16]) {
    constexpr int kPairs = 16 / UNITS;  // of a unit
#pragma unroll
    for (int k = 0; k < UNITS; ++k)
        units[k][i].to_half2(weights.unit(i, step, k), reinterpret_cast<u32(&)[kPairs]>(h[kPairs * k]));
}
