"""Projections q, k and v with RoPE in their epilogue: the bits of the products and `rope_kv.cu`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.gpu.activations import rows_of, scaled_f16
from tests.gpu.test_attention import BLOCKS, Bench, Scene, Shape, prefill_state
from tests.gpu.test_matmul import force_tile
from tests.gpu.weights import Projection
from worker.ops import KV_BLOCK, Batch, Phase, PositionScale
from worker.quants import BF16, F16, Q3_K, Q4_K, Q5_0, Q5_K, Q6_K, Q8_0
from worker.rope import Rope

COLS = 256
CHUNKS = ((40, 21), (0, 77), (200, 64), (16, 1), (320, 100))
"""Position and tokens of the chunks of a batch."""
ROWS = 320
SHAPES = [
    (Shape(64, 14, 2), Q5_0, Q8_0),
    (Shape(64, 9, 3, adjacent=True), Q4_K, Q6_K),
    (Shape(64, 4, 4, rotary_dims=32), Q8_0, Q8_0),
    (Shape(96, 4, 4), Q5_K, Q5_K),
    (Shape(96, 3, 1, adjacent=True, rotary_dims=64), Q6_K, Q6_K),
    (Shape(128, 4, 1), Q4_K, Q4_K),
    (Shape(256, 2, 1, rotary_dims=128), BF16, BF16),
    (Shape(512, 1, 1), Q3_K, Q3_K),
]


def batch_of(memory):
    """Chunks of several sequences, with rows without a token between them and after the last."""
    free = np.random.default_rng(3).permutation(BLOCKS).astype(np.int32)
    chunks, used = [], 0
    for start, count in CHUNKS:
        blocks = -(-(start + count) // KV_BLOCK)
        positions = np.arange(start, start + count, dtype=np.int32)
        chunks.append(Batch(Phase.PREFILL, positions, positions, (free[used : used + blocks],), positions[:0]))
        used += blocks
    return prefill_state(memory, chunks, ROWS, len(chunks))


def projections_of(kernels, memory, shape, kind, last):
    sizes = zip("qkv", (kind, kind, last), (shape.heads, shape.kv_heads, shape.kv_heads), strict=True)
    return [
        Projection(kernels, memory, of, (heads * shape.dim, COLS), name, bias=True).linear for name, of, heads in sizes
    ]


@pytest.mark.parametrize(("shape", "kind", "last"), SHAPES, ids=[f"{s.dim}-{kind.name}" for s, kind, _ in SHAPES])
@pytest.mark.usefixtures("wgmma")
def test_each_tile_gives_the_bits_of_the_products_and_rope(kernels, memory, monkeypatch, shape, kind, last):
    from worker.gpu import matmul, matmul_wgmma

    linears, x = projections_of(kernels, memory, shape, kind, last), rows_of(ROWS, COLS)
    x[5:8] *= np.array([[1e5], [1e30], [np.nan]], np.float32)  # beyond f16, and not finite
    scene, state = Scene(shape, KV_BLOCK), batch_of(memory)
    expected = Bench(scene, kernels, memory)
    rows = replace(scaled_f16(expected.pool, x), count=state.count)
    q, k, v = matmul.projections(kernels, expected.pool, rows, linears)
    attention = expected.prefill_attention
    rotated = attention._rotate(kernels, expected.pool, q, k, v, expected.spec, state).get()
    has_token = state.rows.get().reshape(ROWS, 2)[:, 0] >= 0
    for tile in [tile for tile in matmul_wgmma._tiles(kind) if not tile.short]:
        force_tile(monkeypatch, lambda _, tile=tile: tile)
        for processors in (1, 1000):
            monkeypatch.setattr(kernels, "processors", processors)
            found = Bench(scene, kernels, memory)
            rows = replace(scaled_f16(found.pool, x), count=state.count)
            queries = found.prefill_attention.project(kernels, found.pool, rows, linears, found.spec, state).get()
            assert np.array_equal(queries[has_token].view(np.uint16), rotated[has_token].view(np.uint16))
            assert (queries[~has_token].view(np.uint16) == 0xFFFF).all()
            assert found.cache.array.get().tobytes() == expected.cache.array.get().tobytes()
            found.pool.check()


@pytest.mark.usefixtures("wgmma")
def test_projections_without_such_a_kernel_are_left_to_others(kernels, memory, monkeypatch):
    from worker.gpu import matmul_wgmma

    shape, state = Shape(64, 2, 1), batch_of(memory)
    bench = Bench(Scene(shape, KV_BLOCK), kernels, memory)
    rows = scaled_f16(bench.pool, rows_of(ROWS, COLS))

    def project(kinds=(Q4_K, Q4_K), bench=bench, **changes):
        linears = projections_of(kernels, memory, shape, *kinds)
        spec = replace(bench.spec, **changes)
        return bench.prefill_attention.project(kernels, bench.pool, rows, linears, spec, state)

    assert matmul_wgmma.rope_tile(projections_of(kernels, memory, shape, Q4_K, Q4_K), 16, 64, 64) is None
    force_tile(monkeypatch, lambda tiles: tiles[0])
    assert project() is not None
    assert project((F16, F16)) is None
    assert project((Q4_K, Q8_0)) is None
    assert project(rope=Rope(np.ones(6), BLOCKS * KV_BLOCK)) is None  # quads of pairs that only half rotate
    assert project(v_epsilon=1e-5) is None
    assert project(query_scale=PositionScale(0.1, 16)) is None
    assert project(bench=Bench(Scene(shape, KV_BLOCK, kv_type="q8"), kernels, memory)) is None
    monkeypatch.setattr(kernels, "wgmma", False)
    assert project() is None
