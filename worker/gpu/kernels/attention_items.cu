// The work list of a decode step of several rows, for attention_rows.cu: one entry for each split
// of a row that has tiles (decode_splits.cuh), or one for an inactive row.
//
// Inputs: row_slots [R] i32; positions [S] i32 of the slots; table_stride KV blocks of a block
// table. A row is inactive if its slot or position is negative, or if the position lies beyond the
// table.
// Outputs: list, int2: {entries, stride}, then entries (decode_splits.cuh), in order of rows, and
// of the age of a split's oldest tile. stride ≤ `blocks` blocks, of which b has the entries b, b +
// stride, …, all have the same number of entries, or one less.
// Grid 1, block ITEMS_THREADS, one row a thread. The list is written before the wait: row slots and
// positions are those of before this graph, and no launch before this one reads the list. The
// launch lets its dependents start when the list is complete (pdl.cuh, rule 5).
#include "decode_splits.cuh"
#include "pdl.cuh"
#include "warp.cuh"

// The sum of `v` over earlier threads; `total`: over all.
__device__ __forceinline__ int sum_before(int v, int& total) {
    __shared__ int warps[ITEMS_THREADS / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int sum = v;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
        const int below = __shfl_up_sync(0xffffffffu, sum, by);
        if (lane >= by) sum += below;
    }
    if (lane == 31) warps[warp] = sum;
    __syncthreads();
    int before = 0;
    total = 0;
    for (int w = 0; w < ITEMS_THREADS / 32; ++w) before += w < warp ? warps[w] : 0, total += warps[w];
    __syncthreads();
    return before + sum - v;
}

__global__ void __launch_bounds__(ITEMS_THREADS, 1)
    attention_items(int2* list, const int* row_slots, const int* positions, int rows, int table_stride, int window,
                    int tile, int splits, int blocks) {
    int entries = 0;
    for (int first = 0; first < rows; first += ITEMS_THREADS) {
        const int row = first + threadIdx.x, slot = row < rows ? row_slots[row] : -1;
        int position = slot < 0 ? -1 : positions[slot], total;
        if ((unsigned int)position >= (unsigned int)(table_stride * kKvBlock)) position = -1;
        const SplitTiles tiles(max(position, 0), window, tile, splits, 0);
        const int mine = row >= rows ? 0 : position < 0 ? 1 : tiles.active();
        int2* const to = list + 1 + entries + sum_before(mine, total);
        for (int i = 0; i < mine; ++i) {
            const Entry entry = Entry::of(row, slot, position, i);
            to[i] = make_int2(entry.of_row, entry.of_split);
        }
        entries += total;
    }
    if (threadIdx.x == 0) {
        const int each = (entries + blocks - 1) / blocks;
        list[0] = make_int2(entries, (entries + each - 1) / each);
    }
    __threadfence();
    __syncthreads();  // the first thread that calls launch_dependents calls it for its block
    launch_dependents();
    grid_dependency_wait();  // so that a wait for this launch is one for those before it
}
