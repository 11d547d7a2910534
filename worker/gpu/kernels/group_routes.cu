// Prefill: sorts slots by expert and cuts them into tiles of one expert each (tiles.cuh), on the device.
//
// experts [slots] to order [slots] and table [slots/tile_slots + E], the grid's upper bound: unused tiles get count 0.
// Of the slots the first *count · k are real; count may be null.
// One block of 1024 threads: a warp counts an expert's slots by ballots, thread 0 lays the tiles out, then the warps
// write. Dynamic shared memory: 2·E integers. Stable, so the order is the same every time. Twin: a stable argsort.
#include "pdl.cuh"
#include "tiles.cuh"

__global__ void group_routes(const int* experts, const int most, const int* count, const int k, const int n_experts,
                             const int tile_slots, const int n_tiles, int* order, Tile* table) {
    extern __shared__ int counts[];
    int* const starts = counts + n_experts;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const int slots = count ? *count * k : most;
    grid_dependency_wait();
    for (int e = warp; e < n_experts; e += warps) {
        int own = 0;
        for (int s = 0; s < slots; s += 32)
            own += __popc(__ballot_sync(0xffffffffu, s + lane < slots && experts[s + lane] == e));
        if (lane == 0) counts[e] = own;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        int start = 0, tile = 0;
        for (int e = 0; e < n_experts; ++e) {
            starts[e] = start;
            for (int at = 0; at < counts[e]; at += tile_slots)
                table[tile++] = {e, start + at, min(tile_slots, counts[e] - at)};
            start += counts[e];
        }
        while (tile < n_tiles) table[tile++] = {0, 0, 0};
    }
    __syncthreads();
    for (int e = warp; e < n_experts; e += warps) {
        int next = starts[e];
        for (int s = 0; s < slots; s += 32) {
            const bool mine = s + lane < slots && experts[s + lane] == e;
            const unsigned int all = __ballot_sync(0xffffffffu, mine);
            if (mine) order[next + __popc(all & ((1u << lane) - 1))] = s + lane;
            next += __popc(all);
        }
    }
}
