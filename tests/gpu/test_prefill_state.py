"""Which chunks form a prefill batch, and the rows, tiles and block tables of one."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.gpu.prefill_state import (
    MAX_CHUNKS,
    QUERY_TILE,
    WIDE_TILE,
    PrefillState,
    chunks_at_most,
    most_tiles,
    pack,
    whole_tiles,
)
from worker.ops import KV_BLOCK, Batch, Phase


def chunk(count, start=0, table=None, wanted=()):
    """A chunk whose ids are its positions; its block table is as long as it needs, and two longer."""
    positions = np.arange(start, start + count, dtype=np.int32)
    blocks = np.arange(-(-(start + count) // KV_BLOCK) + 2, dtype=np.int32) if table is None else table
    return Batch(Phase.PREFILL, positions, positions, (blocks,), np.array(wanted, np.int32))


def ids(arrays):
    return [number for array in arrays for number in array.tolist()]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([10], [[10]]),
        ([100], [[64], [36]]),
        ([17, 32, 16], [[17, 32], [16]]),
        ([40, 40], [[40, 16], [24]]),
        ([1, 1, 1, 1, 1], [[1, 1, 1], [1, 1]]),
        ([], []),
    ],
)
def test_chunks_fill_batches_of_64_rows_and_three_chunks_in_whole_tiles(counts, expected):
    assert [[len(part.tokens) for part in each] for each in pack(map(chunk, counts), 64, 3)] == expected


@given(st.lists(st.integers(1, 200), max_size=12), st.integers(1, 8), st.integers(1, 5))
def test_a_packed_chunk_has_its_tokens_positions_and_requested_rows_once_and_in_order(counts, tiles, most):
    chunks = [chunk(count, 16 * n, wanted=[0, count - 1]) for n, count in enumerate(counts)]
    batches = list(pack(chunks, KV_BLOCK * tiles, most))
    for parts in batches:
        assert sum(whole_tiles(len(part.tokens)) for part in parts) <= KV_BLOCK * tiles
        assert len(parts) <= most
        assert all(part.positions[0] % KV_BLOCK == 0 for part in parts)
    parts = [part for parts in batches for part in parts]
    assert ids(part.positions[part.logit_rows] for part in parts) == ids(
        each.positions[each.logit_rows] for each in chunks
    )
    assert ids(part.tokens for part in parts) == ids(each.tokens for each in chunks)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=MAX_CHUNKS))
def test_the_tiles_of_a_batch_are_no_more_than_were_reserved(counts):
    rows = sum(map(whole_tiles, counts))
    for size in (QUERY_TILE, WIDE_TILE):
        assert sum(-(-count // size) for count in counts) <= most_tiles(rows, len(counts), size)
    assert most_tiles(rows, 1) == max(1, (rows + 48) // 64)


@pytest.mark.parametrize(("slots", "chunks"), [(1, 1), (3, 4), (16, 16), (256, 16)])
def test_a_batch_has_no_more_chunks_than_slots_and_rows_of_a_tile_of_logits(slots, chunks):
    assert chunks_at_most(slots) == chunks


@pytest.fixture
def loaded(monkeypatch):
    """A function that returns what a state uploads for chunks, by array."""

    class Uploads:
        def __init__(self, memory, shapes):
            self.arrays = [np.zeros(shape, dtype) for shape, dtype in shapes]

        def upload(self, values, stream):
            self.values = values

    monkeypatch.setattr("worker.gpu.prefill_state.WholeInputs", Uploads)

    def load(*chunks, rows=256, logit_rows=4):
        state = PrefillState(None, rows, logit_rows, 100, 4)
        state.load(chunks, None)
        names = ("tokens", "size", "wanted", "rows", "tiles", "tables")
        assert all(
            value.nbytes <= array.nbytes
            for value, array in zip(state._inputs.values, state._inputs.arrays, strict=True)
        )
        return SimpleNamespace(**dict(zip(names, state._inputs.values, strict=True)), loaded=state.loaded)

    return load


def test_a_batch_has_rows_from_multiples_of_16_on_and_no_token_between_chunks(loaded):
    tables = [np.array(ids, np.int32) for ids in ([7, 8, 9], [30, 31, 32, 33], [5])]
    first, second, third = chunk(18, 0, tables[0]), chunk(20, 32, tables[1], [19]), chunk(3, 0, tables[2], [2])
    batch = loaded(first, second, third)
    assert batch.loaded == 67
    assert batch.size.tolist() == [67, 3, 3, 52]
    assert batch.wanted.tolist() == [2, 32 + 19, 64 + 2]
    assert batch.tables.tolist() == [7, 8, 30, 31, 32, 33, 5]
    rows = {at: tuple(row) for at, row in enumerate(batch.rows.tolist()) if row[0] != -1}
    expected = {at: (at, 0) for at in range(18)} | {32 + at: (32 + at, 2) for at in range(20)}
    assert rows == expected | {64 + at: (at, 6) for at in range(3)}
    assert batch.tokens[[17, 18, 32, 51, 52, 66]].tolist() == [17, 0, 32, 51, 0, 2]


def test_tiles_of_at_most_64_queries_belong_to_one_chunk_and_the_latest_come_first(loaded):
    batch = loaded(chunk(130), chunk(20, 96))
    assert batch.size.tolist() == [164, 4, 2, 130]
    assert [tuple(tile)[:5] for tile in batch.tiles.tolist()] == [
        (128, 128, 0, 130, 0),
        (144, 96, 96, 116, 9),
        (64, 64, 0, 130, 0),
        (0, 0, 0, 130, 0),
        *[(144, 96, 96, 116, 9), (0, 0, 0, 130, 0)],  # the wide tiles
    ]


def test_more_rows_of_logits_than_there_is_memory_for_are_refused(loaded):
    with pytest.raises(ValueError, match="logits of 5 rows exceeds the limit of 4"):
        loaded(chunk(10, wanted=range(5)))
