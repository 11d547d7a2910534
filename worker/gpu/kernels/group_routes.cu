// Prefill: sort slots by expert and cut them into tiles of one expert each (slot_tiles.cuh), on the
// device.
//
// Shapes: experts [slots] i32 to order and places [slots] i32, the inverse of order, and table
// [n_tiles]; n_tiles = slots/tile_slots + E is an upper bound, unused tiles get count 0. Of the
// slots the first *count · k are valid; count may be null. E ≤ the block's threads.
// Grid: one block of up to 32 warps. A warp counts the experts of an equal share of the slots, a
// thread adds an expert's counts up over the warps, warp 0 lays out the experts, then each warp
// places its slots, 32 at a time. Dynamic shared memory: (warps + 3)·E ints. Bytes: 8·slots read,
// 8·slots + 12·n_tiles written. The sort is stable, so the result is deterministic.
// Twin: a stable argsort. Launcher: worker/gpu/matmul.py.
#include "pdl.cuh"
#include "slot_tiles.cuh"
#include "warp.cuh"

constexpr int kLoads = 4;  // of a lane in flight

__global__ void group_routes(const int* experts, const int max_slots, const int* count, const int k,
                             const int n_experts, const int tile_slots, const int n_tiles, int* order, int* places,
                             SlotTile* table) {
    extern __shared__ int shared[];
    __shared__ int used_tiles;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32, e = threadIdx.x;
    int *const totals = shared + warps * n_experts, *const starts = totals + n_experts;
    int *const first_tiles = starts + n_experts, *const own = shared + warp * n_experts;
    // Before the wait (pdl.cuh): *count, which no kernel writes.
    const int slots = count ? *count * k : max_slots, share = (slots + blockDim.x - 1) / blockDim.x * 32;
    const int begin = warp * share, end = min(slots, begin + share);
    for (int i = lane; i < n_experts; i += 32) own[i] = 0;
    grid_dependency_wait();
    __syncwarp();
    for (int s = begin + lane; s < end; s += 32 * kLoads) {
        int ids[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) ids[i] = s + 32 * i < end ? experts[s + 32 * i] : -1;
#pragma unroll
        for (int i = 0; i < kLoads; ++i)
            if (ids[i] >= 0) atomicAdd(&own[ids[i]], 1);
    }
    __syncthreads();
    // A warp's counts become the places of its slots among those of their expert.
    int total = 0;
    if (e < n_experts) {
#pragma unroll 8
        for (int w = 0; w < warps; ++w) {
            const int counted = shared[w * n_experts + e];
            shared[w * n_experts + e] = total;
            total += counted;
        }
        totals[e] = total;
    }
    __syncthreads();
    if (warp == 0) {
        int slots_before = 0, tiles_before = 0;
        for (int id = lane; id - lane < n_experts; id += 32) {
            const int in_all = id < n_experts ? totals[id] : 0, tiles = (in_all + tile_slots - 1) / tile_slots;
            const int slots_to = inclusive_sum(in_all), tiles_to = inclusive_sum(tiles);
            if (id < n_experts) {
                starts[id] = slots_before + slots_to - in_all;
                first_tiles[id] = tiles_before + tiles_to - tiles;
            }
            slots_before += __shfl_sync(0xffffffffu, slots_to, 31);
            tiles_before += __shfl_sync(0xffffffffu, tiles_to, 31);
        }
        if (lane == 0) used_tiles = tiles_before;
    }
    __syncthreads();
    if (e < n_experts)
        for (int at = 0, tile = first_tiles[e]; at < total; at += tile_slots, ++tile)
            table[tile] = {e, starts[e] + at, min(tile_slots, total - at)};
    for (int tile = used_tiles + threadIdx.x; tile < n_tiles; tile += blockDim.x) table[tile] = {0, 0, 0};
    for (int first = begin; first < end; first += 32) {
        const int s = first + lane, id = s < end ? experts[s] : -1;
        const unsigned int same = __match_any_sync(0xffffffffu, id), below = same & ((1u << lane) - 1);
        if (id >= 0) {
            const int place = starts[id] + own[id] + __popc(below);
            order[place] = s, places[s] = place;
        }
        __syncwarp();
        if (id >= 0 && !below) own[id] += __popc(same);
        __syncwarp();
    }
}
