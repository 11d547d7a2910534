// Tiles of pairs for the experts' products of decode, written by group_pairs.cu and read by
// grouped_experts.cu and experts_mma.cu.
//
// Pair r·k + j is row r's j-th expert. A tile is up to `tile_pairs` pairs of one expert, adjacent
// in `order`. A block of a product computes a range of the chunks (some rows of the weights) of all
// tiles; ranges of equal cost are computed in about equal time.
// Python: `ExpertTiles` in worker/gpu/decode_experts.py.
#pragma once

struct __align__(16) ExpertTile {
    int expert, first, count;  // pairs order[first] to order[first + count - 1]
    int start;                 // sum of the costs of a chunk of each earlier tile
};

struct ExpertTiles {
    int* order;         // [R·k] active pairs sorted by expert, ascending within each
    ExpertTile* table;  // [tiles + 1]; unused ones have count 0 and the start of the end
    int tiles, tile_pairs;
    int chunk_cost;  // of a chunk's weights, in units of the arithmetic of one pair
};

// A block's walk over its share of the chunks of all tiles.
struct ChunkWalk {
    const ExpertTile* table;
    ExpertTile tile;
    int at, chunk, chunks, end, chunk_cost;

    __device__ __forceinline__ ChunkWalk(const ExpertTiles& tiles, int n_chunks)
        : table(tiles.table), chunks(n_chunks), chunk_cost(tiles.chunk_cost) {
        const int total = table[tiles.tiles].start * chunks, block = blockIdx.x, blocks = gridDim.x;
        const int share = total / blocks, rest = total % blocks;  // the first `rest` blocks take one more
        const int begin = share * block + min(block, rest);
        end = begin + share + (block < rest);
        at = -1;
        for (int from = 0; from <= tiles.tiles; from += 32) {
            const int i = from + threadIdx.x % 32;
            const bool before = i < tiles.tiles && table[i].count && table[i].start * chunks <= begin;
            at += __popc(__ballot_sync(0xffffffffu, before));
        }
        at = max(at, 0), tile = table[at];
        chunk = (begin - tile.start * chunks + cost() - 1) / cost();
        if (chunk >= chunks) next_tile();
    }
    __device__ __forceinline__ int cost() const { return chunk_cost + tile.count; }
    __device__ __forceinline__ void next_tile() { ++at, chunk = 0, tile = table[at]; }
    __device__ __forceinline__ void advance() {
        if (++chunk == chunks) next_tile();
    }
    __device__ __forceinline__ bool valid() const {
        return tile.count && tile.start * chunks + chunk * cost() < end;
    }
};
