// Decode of several rows: sort the active pairs of rows and experts by expert and cut them into
// tiles of one expert each (expert_tiles.cuh), on the device: small tiles, and wide ones if a table
// for them is passed.
//
// Shapes: experts [R, k] i32 to order [R·k] i32 and table [tiles + 1]; tiles = R·k/tile_pairs +
// min(E, R·k) is an upper bound. Pairs of inactive rows are in no tile.
// Grid: one block of 1024 threads. A warp counts the pairs of an expert by ballots, warps 0 and 1
// lay out the tiles, an expert a lane, then the warps write `order`. Dynamic shared memory: R·k +
// 2·E ints. Bytes: 4·R·k read, 4·R·k + 16·tiles written. The sort is stable, so the result is
// deterministic.
// Twin: a stable argsort. Launcher: worker/gpu/decode_experts.py.
#include "pdl.cuh"
#include "active_rows.cuh"
#include "expert_tiles.cuh"
#include "warp.cuh"

// By one warp: the first pair of each expert, and the table.
__device__ __forceinline__ void lay_out(const int* counts, int* starts, int n_experts, const ExpertTiles& to) {
    const int lane = threadIdx.x % 32, each = to.tile_pairs;
    int pairs = 0, tiles = 0;  // of the experts before
    for (int e = lane; e - lane < n_experts; e += 32) {
        const int count = e < n_experts ? counts[e] : 0, own_tiles = (count + each - 1) / each;
        const int pairs_to = inclusive_sum(count), tiles_to = inclusive_sum(own_tiles);
        const int first = pairs + pairs_to - count, first_tile = tiles + tiles_to - own_tiles;
        if (e < n_experts) starts[e] = first;
        for (int i = 0; i < own_tiles; ++i) {
            const int at = first + each * i, tile = first_tile + i;
            to.table[tile] = {e, at, min(each, first + count - at), to.chunk_cost * tile + at};
        }
        pairs += __shfl_sync(0xffffffffu, pairs_to, 31), tiles += __shfl_sync(0xffffffffu, tiles_to, 31);
    }
    for (int tile = tiles + lane; tile <= to.tiles; tile += 32)
        to.table[tile] = {0, pairs, 0, to.chunk_cost * tiles + pairs};
}

__global__ void __launch_bounds__(1024)
    group_pairs(const int* experts, const int n_pairs, const int k, const int n_experts, const ActiveRows active,
                const ExpertTiles small, const ExpertTiles wide) {
    extern __shared__ int shared[];
    int *const counts = shared, *const starts = counts + n_experts, *const ids = starts + n_experts;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    grid_dependency_wait();
    for (int s = threadIdx.x; s < n_pairs; s += blockDim.x) ids[s] = active[s / k] ? experts[s] : -1;
    __syncthreads();
    for (int e = warp; e < n_experts; e += warps) {
        int matches = 0;
        for (int s = 0; s < n_pairs; s += 32)
            matches += __popc(__ballot_sync(0xffffffffu, s + lane < n_pairs && ids[s + lane] == e));
        if (lane == 0) counts[e] = matches;
    }
    __syncthreads();
    // Both write the same `starts`.
    if (warp == 0) lay_out(counts, starts, n_experts, small);
    if (warp == 1 && wide.table) lay_out(counts, starts, n_experts, wide);
    __syncthreads();
    for (int e = warp; e < n_experts; e += warps) {
        int next = starts[e];
        for (int s = 0; s < n_pairs; s += 32) {
            const bool match = s + lane < n_pairs && ids[s + lane] == e;
            const unsigned int matches = __ballot_sync(0xffffffffu, match);
            if (match) small.order[next + __popc(matches & ((1u << lane) - 1))] = s + lane;
            next += __popc(matches);
        }
    }
}
