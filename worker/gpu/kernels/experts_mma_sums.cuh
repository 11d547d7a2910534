// Sums of an experts' product on the int8 tensor cores in shared memory: those of the warps along
// K, and their total.
#pragma once
#include "experts_mma_stages.cuh"

// Sums of the warps of a block: [row tile][warp along K][parity of the chain][NT][4][33] floats.
// Element i of lane l is that of row l/4 + 8·(i/2) and pair l%4·2 + i%2. The strides keep the lanes
// of the readers in different banks.
template <int NT>
struct MmaSums {
    static constexpr int kElement = 33, kGroup = 4 * kElement, kWarp = 2 * NT * kGroup;
    static constexpr int kRowTile = kChainWarps * kWarp + 1, kFloats = kRowTiles * kRowTile;
    float* const at;
    __device__ __forceinline__ float* own(const MmaWarp& warp) const {
        return at + warp.row_tile * kRowTile + warp.chains * kWarp + threadIdx.x % 32;
    }
    // The sum of row r of a row tile and pair t.
    __device__ __forceinline__ float total(int row_tile, int r, int t) const {
        const int lane = r % 8 * 4 + t % 8 / 2, element = r / 8 * 2 + t % 2;
        const float* const from = at + row_tile * kRowTile + t / 8 * kGroup + element * kElement + lane;
        float sums[2];
#pragma unroll
        for (int parity = 0; parity < 2; ++parity) {
            float v[kChainWarps];
#pragma unroll
            for (int w = 0; w < kChainWarps; ++w) v[w] = from[w * kWarp + parity * NT * kGroup];
            sums[parity] = __fadd_rn(__fadd_rn(v[0], v[2]), __fadd_rn(v[1], v[3]));
        }
        return __fadd_rn(sums[0], sums[1]);
    }
};
