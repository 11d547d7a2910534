// Prefill: sort slots by expert and cut them into tiles of one expert each (slot_tiles.cuh), on the
// device.
//
// Shapes: experts [slots] i32 to order [slots] i32 and table [n_tiles]; n_tiles = slots/tile_slots
// + E is an upper bound, unused tiles get count 0. Of the slots the first *count · k are valid;
// count may be null.
// Grid: one block of 1024 threads. A warp counts the slots of an expert by ballots, thread 0 lays
// out the tiles, then the warps write `order`. Dynamic shared memory: 2·E ints. Bytes: 8·E·slots
// read from L1, 4·slots + 12·n_tiles written. The sort is stable, so the result is deterministic.
// Twin: a stable argsort. Launcher: worker/gpu/matmul.py.
#include "pdl.cuh"
#include "slot_tiles.cuh"

__global__ void group_routes(const int* experts, const int max_slots, const int* count, const int k,
                             const int n_experts, const int tile_slots, const int n_tiles, int* order,
                             SlotTile* table) {
    extern __shared__ int counts[];
    int* const starts = counts + n_experts;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    // Before the wait (pdl.cuh): *count, which no kernel writes.
    const int slots = count ? *count * k : max_slots;
    grid_dependency_wait();
    for (int e = warp; e < n_experts; e += warps) {
        int matches = 0;
        for (int s = 0; s < slots; s += 32)
            matches += __popc(__ballot_sync(0xffffffffu, s + lane < slots && experts[s + lane] == e));
        if (lane == 0) counts[e] = matches;
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
            const bool match = s + lane < slots && experts[s + lane] == e;
            const unsigned int matches = __ballot_sync(0xffffffffu, match);
            if (match) order[next + __popc(matches & ((1u << lane) - 1))] = s + lane;
            next += __popc(matches);
        }
    }
}
