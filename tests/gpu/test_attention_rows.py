"""Decode attention of several rows gives every row the bits that it gets alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.gpu.activations import q8_tiles
from tests.gpu.test_attention import Bench, Scene, Shape
from worker.gpu.attention import group_size
from worker.ops import KV_BLOCK

BLOCKS = 200
LENGTHS = (0, 15, 128, 255, 700, 1500, 3000)

SHAPES = [
    Shape(64, 14, 2),
    Shape(64, 16, 2, window=128, sinks=True),
    Shape(64, 8, 2, adjacent=True),
    Shape(64, 2, 2, window=5, sinks=True, rotary_dims=32),
    Shape(64, 4, 2, adjacent=True, window=700),
    Shape(64, 16, 1),
    Shape(64, 5, 1, sinks=True),
    Shape(64, 6, 1, window=300),
    Shape(96, 4, 4),
    Shape(96, 6, 2, window=140, adjacent=True, rotary_dims=64),
    Shape(128, 8, 1, adjacent=True),
    Shape(128, 4, 2, window=100, sinks=True),
    Shape(256, 4, 2, window=140),
    Shape(256, 8, 1, sinks=True),
    Shape(512, 4, 1, window=140),
]


ALL, NONE = float("inf"), 0.0
WIDE = [shape for shape in SHAPES if shape.dim == 64 and shape.heads >= 5 * shape.kv_heads]
BOTH_KERNELS = [*((shape, NONE) for shape in SHAPES), *((shape, ALL) for shape in WIDE)]
"""Shapes, and up to how many items attention_few_rows computes them instead of attention_rows."""


@pytest.fixture
def few(monkeypatch, request):
    """The limit on the items of attention_few_rows."""
    monkeypatch.setattr("worker.gpu.decode_attention._FEW_ITEMS", request.param)
    return request.param


@pytest.fixture
def long(monkeypatch):
    """Scenes of up to 3,200 positions."""
    monkeypatch.setattr("tests.gpu.test_attention.BLOCKS", BLOCKS)


def bits(bench, row):
    """The bits of one row in all three forms."""
    return [part.get()[row].view(np.uint8).tolist() for part in (bench.rows.x, bench.rows.q, bench.rows.meta)]


class Alone:
    """The bits of single rows, over a cache that has the keys and values of all of them.

    Rows of one sequence read what the others write, so every position is written first.
    """

    def __init__(self, scene, kernels, memory, positions):
        self.bench = Bench(scene, kernels, memory, slots=1)
        self.bench.fill(scene.tokens)
        for position in positions:
            self.bench.decode([position])
        self.rows = {position: self.row(position) for position in positions}

    def row(self, position):
        self.bench.decode([position])
        return bits(self.bench, 0)

    def cache(self):
        return self.bench.cache.array.get()


def poison(cache, scene, positions):
    """The cache with NaNs instead of the keys and values at `positions`."""
    words = cache.copy().view(np.uint16)
    for position in positions:
        words[0, :, scene.table[position // KV_BLOCK], :, position % KV_BLOCK] = 0xFFFF
    return words.view(np.float16)


@pytest.mark.parametrize(("shape", "few"), BOTH_KERNELS, ids=str, indirect=["few"])
def test_rows_of_any_lengths_in_any_order_have_the_bits_of_single_rows(kernels, memory, long, shape, few):
    scene = Scene(shape, 3001)
    single = Alone(scene, kernels, memory, LENGTHS)
    rng = np.random.default_rng(1)
    for processors in (1, 132):
        order = rng.permutation(len(LENGTHS) + 1)
        positions = [*LENGTHS, -1]
        row_slots = np.insert(order, 3, -1)  # two rows have no work
        bench = Bench(scene, kernels, memory, processors, slots=len(row_slots))
        bench.cache.array.set(single.cache())
        bench.decode(positions, row_slots)
        for row, slot in enumerate(row_slots):
            position = -1 if slot < 0 else positions[slot]
            got = bits(bench, row)
            if position < 0:
                assert not any(map(any, got))
            else:
                assert got == single.rows[position]
        bench.pool.check()
        assert np.array_equal(bench.cache.array.get().view(np.uint16), single.cache().view(np.uint16))


@pytest.mark.parametrize(("shape", "few"), BOTH_KERNELS[::4], ids=str, indirect=["few"])
def test_every_row_writes_its_key_and_value(kernels, memory, long, shape, few):
    scene = Scene(shape, 3001)
    single = Alone(scene, kernels, memory, [3000])
    bench = Bench(scene, kernels, memory, slots=3)
    bench.cache.array.set(poison(single.cache(), scene, [3000]))
    bench.decode([-1, 3000], [1, -1, -1])
    assert bits(bench, 0) == single.rows[3000]
    assert np.array_equal(bench.cache.array.get().view(np.uint16), single.cache().view(np.uint16))


@pytest.mark.parametrize("blocks", [1, 16])
@pytest.mark.parametrize(
    ("shape", "few"),
    [(SHAPES[0], ALL), (SHAPES[0], NONE), (SHAPES[2], NONE), (SHAPES[8], NONE)],
    ids=str,
    indirect=["few"],
)
def test_splits_of_several_tiles_have_the_bits_of_single_rows(kernels, memory, long, monkeypatch, shape, few, blocks):
    monkeypatch.setattr("worker.gpu.decode_attention._DECODE_BLOCKS", blocks)
    scene = Scene(shape, 2000)
    positions = (1999, 3, 1027, 640)
    single = Alone(scene, kernels, memory, positions)
    bench = Bench(scene, kernels, memory, 2, slots=4)
    bench.cache.array.set(single.cache())
    for _ in range(2):  # a launch leaves the arrival counters at zero
        bench.decode(positions)
        assert [bits(bench, row) for row in range(4)] == [single.rows[position] for position in positions]


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[8]], ids=str)
def test_teams_of_any_number_of_warps_have_the_bits_of_single_rows(kernels, memory, monkeypatch, shape):
    monkeypatch.setattr("worker.gpu.decode_attention._DECODE_BLOCKS", 16)
    monkeypatch.setattr("worker.gpu.decode_attention._FEW_ITEMS", NONE)
    scene = Scene(shape, 1100)
    positions = (1099, 3, 255, 640)
    single = Alone(scene, kernels, memory, positions)
    for warps in (1, 2, 4, 8):
        monkeypatch.setattr("worker.gpu.decode_attention.DecodeAttention._team_warps", lambda *_, warps=warps: warps)
        bench = Bench(scene, kernels, memory, 2, slots=4)
        bench.cache.array.set(single.cache())
        bench.decode(positions)
        assert [bits(bench, row) for row in range(4)] == [single.rows[position] for position in positions]


@pytest.mark.parametrize(
    ("shape", "rows", "warps"),
    [
        (Shape(64, 14, 2), 64, 8),
        (Shape(64, 14, 2), 1024, 4),
        (Shape(64, 32, 8), 32, 8),
        (Shape(64, 32, 8), 256, 4),
        (Shape(96, 32, 32), 64, 1),
        (Shape(128, 32, 8), 256, 4),
        (Shape(256, 8, 4), 1, 4),
        (Shape(256, 8, 4), 256, 2),
    ],
    ids=str,
)
def test_teams_have_fewer_warps_the_more_items_there_are(kernels, memory, shape, rows, warps):
    bench = Bench(Scene(shape, 1), kernels, memory)
    assert bench.decode_attention._team_warps(bench.spec, rows) == warps


@pytest.mark.parametrize(
    ("shape", "rows", "splits", "few"),
    [
        (Shape(64, 14, 2), 8, 16, True),
        (Shape(64, 14, 2), 16, 16, False),
        (Shape(64, 14, 2), 8, 32, False),
        (Shape(64, 64, 8), 2, 16, True),
        (Shape(64, 32, 8), 2, 1, False),
        (Shape(64, 2, 2), 2, 1, False),
        (Shape(128, 8, 1), 2, 1, False),
    ],
    ids=str,
)
def test_few_rows_of_large_groups_have_a_kernel_of_their_own(kernels, memory, shape, rows, splits, few):
    bench = Bench(Scene(shape, 1), kernels, memory)
    assert bench.decode_attention._are_few(bench.spec, rows, splits) is few


@pytest.mark.parametrize("few", [ALL, NONE], indirect=True)
def test_rows_that_fill_tiles_have_the_values_of_q8_rows(kernels, memory, few):
    scene = Scene(Shape(64, 14, 2), 300)
    bench = Bench(scene, kernels, memory, slots=16)
    bench.fill(300)
    bench.decode(range(284, 300))
    expected = q8_tiles(bench.pool, bench.rows.x.get())
    assert np.array_equal(bench.rows.q.get(), expected.q.get())
    assert np.array_equal(bench.rows.meta.get(), expected.meta.get())


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[8]], ids=str)
def test_inactive_rows_leave_every_other_key_and_value_as_it_is(kernels, memory, shape):
    scene = Scene(shape, 300)
    bench = Bench(scene, kernels, memory, slots=8)
    bench.fill(290)
    before = bench.cache.array.get().view(np.uint16)
    bench.decode([290, -1, len(scene.table) * KV_BLOCK], [-1, 1, 0, 2, -1, -1, -1, -1])
    after = bench.cache.array.get().view(np.uint16)
    at = (0, slice(None), int(scene.table[290 // KV_BLOCK]), slice(None), 290 % KV_BLOCK)
    assert not np.array_equal(after[at], before[at])
    after[at] = before[at]
    assert np.array_equal(after, before)
    assert not bench.rows.x.get()[[0, 1, 3, 4, 5, 6, 7]].any()


def test_layers_with_other_windows_have_their_own_work_lists(kernels, memory):
    scene = Scene(Shape(64, 16, 2), 300)
    windowed = Scene(Shape(64, 16, 2, window=20), 300)
    expected = {0: Alone(scene, kernels, memory, (299, 40)), 20: Alone(windowed, kernels, memory, (299, 40))}
    bench = Bench(scene, kernels, memory, slots=2)
    bench.cache.array.set(expected[0].cache())
    full, local = bench.spec, replace(bench.spec, window=20)
    for spec in (full, local, full, local):
        bench.spec = spec
        bench.decode([299, 40])
        assert [bits(bench, 0), bits(bench, 1)] == [expected[spec.window].rows[position] for position in (299, 40)]


def test_rows_beyond_a_block_of_threads_are_listed(kernels, memory):
    from worker.gpu.decode_attention import decode_splits, decode_tile

    bench = Bench(Scene(Shape(64, 2, 2), 20), kernels, memory)
    positions = np.random.default_rng(0).integers(-50, 4096, 700).astype(np.int32)
    row_slots = np.random.default_rng(1).permutation(700).astype(np.int32)
    tile, splits = decode_tile(bench.spec), decode_splits(bench.spec)
    work = bench.pool.empty((1 + 700 * 16, 2), np.int32)
    sizes = map(np.int32, (700, 256, 1000, tile, splits, 53))
    kernels.get("attention_items.cu", "attention_items")(
        (1,), (256,), (work, bench.pool.put(row_slots), bench.pool.put(positions), *sizes)
    )
    expected = []
    for row, slot in enumerate(row_slots):
        at = int(positions[slot])
        count = min(splits, at // tile - max(0, at - 999) // tile + 1) if at >= 0 else 1
        expected += [(row, slot, at, mine) if at >= 0 else (row, slot, -1, 63) for mine in range(count)]
    (count, stride), entries = work.get()[0].tolist(), work.get()[1:]
    listed = [(of_row >> 16, of_row & 0xFFFF, of_split >> 6, of_split & 63) for of_row, of_split in entries.tolist()]
    assert listed[:count] == expected
    assert stride <= 53
    assert -(-count // stride) == -(-count // 53)
    bench.pool.check()


@pytest.mark.parametrize(("heads", "kv_heads", "group"), [(14, 2, 7), (32, 8, 4), (32, 32, 1), (64, 8, 8), (32, 2, 8)])
def test_groups_of_heads_are_those_of_one_kv_head(heads, kv_heads, group):
    assert group_size(Scene(Shape(64, heads, kv_heads), 1).spec(lambda sinks: sinks)) == group
