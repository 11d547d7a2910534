// Prefill on sm_90: the projections q, k and v of one x by `wgmma`, and RoPE of q and k in the
// epilogue; q is written as f16 for attention, k and v to the KV cache.
//
//   q'[t] = rope(W_q·x[t] + b_q, p), K[p] = rope(W_k·x[t] + b_k, p), V[p] = W_v·x[t] + b_v
// with p the position of row t. Bits are those of matmul_wgmma.cu and rope_kv.cu, between which q,
// k and v pass through memory as f32. A lane's two rows of weights are the two elements of a pair
// (rope.cuh), so that it has both in its sums; a tile is 64 pairs, of any heads, × TILE_N tokens.
// Pairs of values are rows of v which are not rotated.
// Shapes: x, projections, Last, *count: as in matmul_wgmma.cu, without `out` and `residual`; rows
// are whole heads of `dim` elements, a multiple of 8, and so are `dims` of them, which rotate.
// Outputs: queries [T, H·dim] f16; caches F16Kv (kv_cache.cuh); f16 values are clamped to ±65504.
// Rows of a batch without a token write nothing.
// Grid, threads, alignment, shared memory, bytes read: as matmul_wgmma.cu. Bytes written: 2 an element.
// Launchers: worker/gpu/matmul_wgmma.py, prefill_attention.py.
#include "pdl.cuh"
#include "half.cuh"
#include "kv_cache.cuh"
#include "prefill_batch.cuh"
#include "rope.cuh"
#include "staged_write.cuh"
#include "wgmma_ring.cuh"

// Python: `HEADS` in worker/gpu/matmul_wgmma.py.
struct Heads {
    unsigned short *queries, *k_cache, *v_cache;
    RopeTables rope;
    int adjacent, dim, n_kv_heads;
    PrefillBatch batch;
};
static_assert(sizeof(Heads) == HEADS_BYTES, "as laid out by worker/gpu/matmul_wgmma.py");

// Positions and KV blocks of the tokens of a tile; position -1: no token.
template <int TILE_N>
struct TokenPlaces {
    int positions[TILE_N], blocks[TILE_N];
};

// Fill in the places of the tokens of `tile`. A warpgroup calls it with `read_tokens`.
template <int TILE_N>
__device__ __forceinline__ void read_places(const PrefillBatch& batch, const SlotTile& tile, TokenPlaces<TILE_N>& places) {
    for (int i = threadIdx.x % 128; i < TILE_N; i += 128) {
        const PrefillRow row = batch.rows[tile.first + min(i, tile.count - 1)];
        places.positions[i] = i < tile.count ? row.position : -1;
        places.blocks[i] = row.position < 0 ? 0 : batch.tables[row.table + row.position / kKvBlock];
    }
}

// Four pairs of a head, and where their elements are.
struct PairQuad {
    int head, first, second, table_index;  // of the first pair
    bool adjacent, rotates;                // adjacent: the eight elements follow one another

    __device__ __forceinline__ PairQuad(int pair, const Heads& heads, bool is_value) {
        const int pairs = heads.dim / 2, i = pair % pairs;
        head = pair / pairs, table_index = i;
        adjacent = heads.adjacent || i >= heads.rope.dims / 2;
        const int2 elements = rope_pair(i, heads.rope.dims, heads.adjacent);
        first = elements.x, second = elements.y;
        rotates = !is_value && first < heads.rope.dims;
    }
    // Both elements of each pair, of a head.
    __device__ __forceinline__ void load(const float* from, float (&x)[2][4]) const {
        if (adjacent) {
            float both[8];
            load_quad(from + first, both);
            load_quad(from + first + 4, both + 4);
#pragma unroll
            for (int e = 0; e < 4; ++e) x[0][e] = both[2 * e], x[1][e] = both[2 * e + 1];
        } else {
            load_quad(from + first, x[0]);
            load_quad(from + second, x[1]);
        }
    }
    __device__ __forceinline__ void rotate(int position, const RopeTables& rope, float* x, float* y) const {
        if (!rotates) return;
        const size_t at = (size_t)position * (rope.dims / 2) + table_index;
        float cos[4], sin[4];
        load_quad(rope.cos + at, cos);
        load_quad(rope.sin + at, sin);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const float2 rotated = rotate_pair(x[e], y[e], cos[e], sin[e]);
            x[e] = rotated.x, y[e] = rotated.y;
        }
    }
    __device__ __forceinline__ void store(unsigned short* to, const float* x, const float* y) const {
        if (adjacent) {
            const uint2 low = halves_of(make_float4(x[0], y[0], x[1], y[1]));
            const uint2 high = halves_of(make_float4(x[2], y[2], x[3], y[3]));
            *reinterpret_cast<uint4*>(to + first) = make_uint4(low.x, low.y, high.x, high.y);
        } else {
            *reinterpret_cast<uint2*>(to + first) = halves_of(make_float4(x[0], x[1], x[2], x[3]));
            *reinterpret_cast<uint2*>(to + second) = halves_of(make_float4(y[0], y[1], y[2], y[3]));
        }
    }
};

// Rotate the pairs of a warp, from `first_pair` on, and write them. `kind`: 0 for queries, 1 for
// keys, 2 for values.
template <int TILE_N>
__device__ __forceinline__ void write_heads(const Heads& heads, const Projection& projection, int kind,
                                            const TokenTile<TILE_N>& tokens, const TokenPlaces<TILE_N>& places, int first_pair,
                                            const Accumulator<1, TILE_N>& sums, StagedRows& staged) {
    using Quads = LaneQuads<2>;  // both elements of pairs
    const int pair = first_pair + 4 * Quads::quad();
    const bool valid = 2 * pair < projection.rows;
    const PairQuad pairs(pair, heads, kind == 2);
    float bias[2][4] = {};
    if (projection.bias && valid) pairs.load(projection.bias + pairs.head * heads.dim, bias);
#pragma unroll 1
    for (int first = 0; first < TILE_N; first += kStagedTokens) {
        stage_sums<TILE_N>(sums, first, staged);
        Quads lane;
        lane.load(staged, tokens, first, bias);
#pragma unroll
        for (int i = 0; i < Quads::kStores; ++i) {
            const int token = first + Quads::token(i), position = places.positions[token];
            if (position < 0 || !valid) continue;
            float *x = lane.y[0] + 4 * i, *y = lane.y[1] + 4 * i;
            pairs.rotate(position, heads.rope, x, y);
            unsigned short* to;
            if (kind == 0)
                to = heads.queries + (size_t)tokens.slots[token] * projection.rows + pairs.head * heads.dim;
            else
                to = (kind == 1 ? heads.k_cache : heads.v_cache) +
                     F16Kv::row(places.blocks[token], heads.n_kv_heads, pairs.head, position, heads.dim);
            pairs.store(to, x, y);
        }
    }
}

template <class Block, int TILE_N, int STAGES, class Last = Block>
__global__ void __launch_bounds__(kConsumers + 128, 1)
    matmul_wgmma_rope(const __grid_constant__ MatmulParams p, const __grid_constant__ TensorMap x, const int n_tokens,
                      const TileGrid grid, const __grid_constant__ Heads heads) {
    extern __shared__ u8 shared[];
    __shared__ TokenTile<TILE_N> tokens_of_groups[kConsumers / 128];
    __shared__ TokenPlaces<TILE_N> places_of_groups[kConsumers / 128];
    __shared__ StagedRows staged[kConsumers / 32];
    TokenTile<TILE_N>& tokens = tokens_of_groups[threadIdx.x % kConsumers / 128];
    TokenPlaces<TILE_N>& places = places_of_groups[threadIdx.x % kConsumers / 128];
    const SlotTiles dense = {};
    run<TILE_N, STAGES, false>(
        shared, p, x, dense, grid, n_tokens,
        [&](const Stages<STAGES>& ring, RingPosition<STAGES>& at, int row_tile, const SlotTile& tile) {
            const Projection* projection = projection_of<0>(p, row_tile);
            const int kind = projection - p.projections;
            const int first_pair = ((row_tile - projection->first_block) * 8 + threadIdx.x / 32) * 8;
            const int pair = min(first_pair + (int)threadIdx.x % 32 / 4, projection->rows / 2 - 1), pairs = heads.dim / 2;
            const int2 elements = rope_pair(pair % pairs, heads.rope.dims, heads.adjacent);
            const int first_row = pair / pairs * heads.dim;
            Accumulator<1, TILE_N> acc = {};
            const auto wait_for_x = [&] {
                grid_dependency_wait();
                wait_for_group();  // until every warp has written its previous tile: tokens are replaced
                read_tokens<128>(p, dense, tile, tokens);
                read_places(heads.batch, tile, places);
            };
            const int2 rows = make_int2(first_row + elements.x, first_row + elements.y);
            if (kSame<Block, Last> || kind < 2)
                accumulate<TILE_N>(WeightIterator<Block, 1, 0>(p.cols, rows), projection, p.cols, ring, at, acc, wait_for_x);
            else
                accumulate<TILE_N>(WeightIterator<Last, 1, 0>(p.cols, rows), projection, p.cols, ring, at, acc, wait_for_x);
            wait_for_group();
            write_heads(heads, *projection, kind, tokens, places, first_pair, acc, staged[threadIdx.x / 32]);
        });
}
