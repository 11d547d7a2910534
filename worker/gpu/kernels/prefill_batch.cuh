// Prefill batch: chunks of several prompts, whose rows are computed together.
//
// A chunk's rows begin at a multiple of kKvBlock; rows between two chunks have no token. They get
// finite activations, since rows of products do not depend on each other, and nothing of them is
// written to the KV cache. Host side: worker/gpu/prefill_state.py. Users: rope_kv.cu,
// matmul_wgmma_rope.cu, scale_queries.cu, attention_prefill.cu, attention_wgmma.cu,
// attention_512.cu.
#pragma once

struct PrefillSize {
    int rows, tiles, wide_tiles, longest;  // longest: the position after the last token of the longest sequence
};

// Of one row: its position, or -1 without a token; where its block table begins in `tables`.
struct PrefillRow {
    int position, table;
};

// Rows [row, row + QUERY_TILE), or WIDE_TILE, of one chunk: positions `position` …, of a chunk of
// [start, end).
struct alignas(16) PrefillTile {
    int row, position, start, end, table, unused[3];
};

struct PrefillBatch {
    const PrefillSize* size;
    const PrefillRow* rows;
    const PrefillTile* tiles;  // then the wide tiles
    const int* tables;
};

static_assert(sizeof(PrefillSize) == PREFILL_SIZE_BYTES && sizeof(PrefillRow) == PREFILL_ROW_BYTES &&
                  sizeof(PrefillTile) == PREFILL_TILE_BYTES && sizeof(PrefillBatch) == PREFILL_BATCH_BYTES,
              "as laid out by worker/gpu/prefill_state.py");
