"""Inputs of a prefill batch: chunks of several prompts, whose rows are computed together.

A chunk's rows begin at a multiple of B, so that a token has the same place in a tile of B rows in
every batch; the rows between two chunks have no token. Products read all rows. Attention reads the
tiles of queries, each of one chunk. Kernel side: `kernels/prefill_batch.cuh`. Next: `runner.py`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from worker.gpu.memory import DeviceMemory
from worker.gpu.state import WholeInputs, rows_of
from worker.ops import KV_BLOCK, Batch

MAX_CHUNKS = 16
"""Chunks of a batch at most: as many rows of logits as a tile of their product has."""
QUERY_TILE = 64
"""Rows of a tile of queries at most."""
WIDE_TILE = 192
"""Rows of a wide tile of queries at most: of a block of attention_wgmma.cu."""

_SIZE = np.dtype([(name, "i4") for name in ("rows", "tiles", "wide_tiles", "longest")])
"""`PrefillSize` of prefill_batch.cuh."""
_ROW = np.dtype([("position", "i4"), ("table", "i4")])
"""`PrefillRow` of prefill_batch.cuh."""
_TILE = np.dtype([*((name, "i4") for name in ("row", "position", "start", "end", "table")), ("unused", "i4", 3)])
"""`PrefillTile` of prefill_batch.cuh."""
PREFILL_BATCH = np.dtype([(name, "u8") for name in ("size", "rows", "tiles", "tables")], align=True)
"""`PrefillBatch` of prefill_batch.cuh."""
_NO_TOKEN = -1
DEFINES = {
    "QUERY_TILE": QUERY_TILE,
    "WIDE_TILE": WIDE_TILE,
    "PREFILL_SIZE_BYTES": _SIZE.itemsize,
    "PREFILL_ROW_BYTES": _ROW.itemsize,
    "PREFILL_TILE_BYTES": _TILE.itemsize,
    "PREFILL_BATCH_BYTES": PREFILL_BATCH.itemsize,
}


def pack(chunks: Iterable[Batch], rows: int, most: int) -> Iterator[list[Batch]]:
    """Put chunks, in order, into batches of at most `rows` rows and `most` chunks.

    A chunk that exceeds what is left of a batch is cut there. `rows` is a multiple of B.
    """
    packed: list[Batch] = []
    left = rows
    for chunk in chunks:
        at, count = 0, len(chunk.tokens)
        while at < count:
            if not left or len(packed) == most:
                yield packed
                packed, left = [], rows
            part = _part(chunk, at, min(at + left, count))
            packed.append(part)
            left -= whole_tiles(len(part.tokens))
            at += len(part.tokens)
    if packed:
        yield packed


def _part(chunk: Batch, start: int, stop: int) -> Batch:
    """Tokens [start, stop) of a chunk."""
    wanted = chunk.logit_rows[(chunk.logit_rows >= start) & (chunk.logit_rows < stop)] - start
    tokens, positions = chunk.tokens[start:stop], chunk.positions[start:stop]
    return replace(chunk, tokens=tokens, positions=positions, logit_rows=wanted)


def chunks_at_most(slots: int) -> int:
    """Chunks of a batch at most: a row of logits for each slot, and no more than MAX_CHUNKS."""
    return min(MAX_CHUNKS, rows_of(slots))


def whole_tiles(rows: int) -> int:
    """The next multiple of B."""
    return -(-rows // KV_BLOCK) * KV_BLOCK


def most_tiles(rows: int, chunks: int, size: int = QUERY_TILE) -> int:
    """Tiles of at most `size` queries that a batch of `rows` rows and `chunks` chunks can have."""
    rows = whole_tiles(rows)
    chunks = min(chunks, rows // KV_BLOCK)
    return max(1, (rows + chunks * (size - KV_BLOCK)) // size)


class PrefillState:
    """Inputs of a batch of at most T rows, C chunks and R rows of logits.

    Of the batch: `size`, one _SIZE: rows, tiles, wide tiles, and the position after the last token
    of the longest sequence; `rows` [T] of _ROW: position and place of the block table of each row's
    sequence, position -1 without a token; `tiles` of _TILE, those of QUERY_TILE rows and then those
    of WIDE_TILE, of each the ones at the latest positions first; `tables` [C·blocks] i32, the block
    tables one after another. `tokens` [T] i32; `wanted` [R] i32: rows whose logits are requested.
    `count` [1] i32 is the number of rows, `wanted_count` [1] i32 that of valid elements of
    `wanted`. `loaded` is the number of rows on the host.
    """

    def __init__(self, memory: DeviceMemory, rows: int, logit_rows: int, blocks: int, chunks: int = 1) -> None:
        self.blocks, self.chunks, self.loaded = blocks, chunks, 0
        shapes = [((size,), np.int32) for size in (rows, _SIZE.itemsize // 4, 1 + logit_rows)]
        tiles = sum(most_tiles(rows, chunks, size) for size in (QUERY_TILE, WIDE_TILE))
        shapes += [((each,), np.int32) for each in (2 * rows, 8 * tiles, chunks * blocks)]
        self._inputs = WholeInputs(memory, shapes)  # the tables last: of them the beginning is uploaded
        self.tokens, self.size, wanted, self.rows, self.tiles, self.tables = self._inputs.arrays
        self.count = self.size[:1]
        self.wanted_count, self.wanted = wanted[:1], wanted[1:]

    @cached_property
    def params(self) -> np.ndarray[Any, Any]:
        """The kernel parameter `PrefillBatch`: a value of PREFILL_BATCH."""
        return np.array(tuple(each.data.ptr for each in (self.size, self.rows, self.tiles, self.tables)), PREFILL_BATCH)

    def load(self, chunks: Sequence[Batch], stream: Any) -> None:
        """Upload the chunks of a batch: those that `pack` returns together.

        Raises: ValueError if more rows of logits are requested than R.
        """
        tokens, rows = np.zeros(self.tokens.shape, np.int32), np.full(len(self.tokens), _NO_TOKEN, _ROW)
        tiles: dict[int, list[tuple[int, ...]]] = {QUERY_TILE: [], WIDE_TILE: []}
        wanted: list[int] = []
        tables: list[np.ndarray[Any, Any]] = []
        first = table = end = longest = 0
        for chunk in chunks:
            start, count = int(chunk.positions[0]), len(chunk.tokens)
            end = first + count
            tokens[first:end] = chunk.tokens
            rows["position"][first:end], rows["table"][first:end] = chunk.positions, table
            longest = max(longest, start + count)
            for size, found in tiles.items():
                found += [(first + at, start + at, start, start + count, table) for at in range(0, count, size)]
            wanted += (first + chunk.logit_rows).tolist()
            tables.append(chunk.block_tables[0][: -(-(start + count) // KV_BLOCK)])
            first, table = whole_tiles(end), table + len(tables[-1])
        if len(wanted) > len(self.wanted):
            raise ValueError(f"a batch with logits of {len(wanted)} rows exceeds the limit of {len(self.wanted)}")
        self.loaded = end
        for found in tiles.values():
            found.sort(key=lambda tile: -tile[1])
        self._inputs.upload(
            (
                tokens,
                np.array((end, *map(len, tiles.values()), longest), np.int32),
                np.array([len(wanted), *wanted], np.int32),
                rows,
                np.array([(*tile, (0, 0, 0)) for found in tiles.values() for tile in found], _TILE),
                np.concatenate(tables),
            ),
            stream,
        )

    def wait(self) -> None:
        """Wait until the newest batch is uploaded, that is until those before it are computed."""
        self._inputs.wait()
