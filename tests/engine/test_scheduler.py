"""Chunk sizes: late in a long prompt chunks are smaller, so that a step takes no longer."""

from __future__ import annotations

import pytest

from worker.engine.scheduler import chunk_after
from worker.ops import KV_BLOCK


@pytest.mark.parametrize(
    ("prefilled", "chunk", "expected"),
    [(0, 1024, 1024), (32_767, 1024, 1024), (32_768, 1024, 512), (65_536, 1024, 256), (131_072, 1024, 128)],
)
def test_a_chunk_halves_each_time_the_context_has_doubled(prefilled, chunk, expected):
    assert chunk_after(prefilled, chunk) == expected


@pytest.mark.parametrize("chunk", [16, 64, 128])
def test_small_chunks_stay_as_they_are(chunk):
    assert chunk_after(1_000_000, chunk) == chunk


@pytest.mark.parametrize("chunk", [16 * n for n in range(1, 257)])
def test_a_chunk_is_always_a_number_of_full_blocks(chunk):
    sizes = [chunk_after(prefilled, chunk) for prefilled in (0, 40_000, 70_000, 140_000, 10**6)]
    assert all(size > 0 and size % KV_BLOCK == 0 for size in sizes)
    assert sizes == sorted(sizes, reverse=True)
