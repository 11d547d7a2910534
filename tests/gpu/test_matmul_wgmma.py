"""Prefill's products with `wgmma`: one result for all tiles, and which tile is chosen.

Their results are compared with f64 in `test_matmul.py`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.gpu.activations import glu_rows, rows_of, scaled_f16
from tests.gpu.guarded import GuardedPool
from tests.gpu.products import EACH_TYPE, PREFILL_OWN
from tests.gpu.test_matmul import force_tile
from tests.gpu.weights import Projection, error
from tests.quantized_ops import in_f16
from worker.gpu.layouts import MIXED
from worker.ops import GELU_GLU, SWIGLU
from worker.quants import BF16, F16, F32, Q4_K, Q6_K, Q8_0

COLS = 1792
"""Columns of 14 steps, so that every ring of stages is filled again."""


def results_of_all_tiles(kernels, monkeypatch, kinds, product, *, gated=False, gelu=False):
    """The distinct bytes that `product(tokens)` returns for all tiles; rows of fewer tokens included."""
    from worker.gpu import matmul_wgmma

    tiles = matmul_wgmma._tiles(kinds[0])
    kernels.prepare(matmul_wgmma._name(kinds[0], tile, gated=gated, gelu=gelu, last=kinds[-1]) for tile in tiles)
    found = set()
    for tile in tiles:
        force_tile(monkeypatch, lambda _, tile=tile: tile)
        whole = product(70)
        assert [y[:9].tobytes() for y in product(9)] == [y[:9].tobytes() for y in whole]
        found.add(b"".join(y.tobytes() for y in whole))
    return found


@EACH_TYPE
@pytest.mark.usefixtures("wgmma")
def test_every_tile_gives_the_same_bits(kernels, memory, monkeypatch, kind):
    from worker.gpu.matmul import matmul

    projection, x = Projection(kernels, memory, kind, (70, COLS), bias=True), rows_of(70, COLS)

    def product(tokens):
        pool = GuardedPool()
        y = matmul(kernels, pool, scaled_f16(pool, x[:tokens]), projection.linear)
        pool.check()
        assert error(y.get(), projection.exact(in_f16(x[:tokens]))) < PREFILL_OWN
        return [y.get()]

    kind = projection.linear.weight.kind
    assert len(results_of_all_tiles(kernels, monkeypatch, [kind], product)) == 1


@pytest.mark.parametrize("activation", [SWIGLU, GELU_GLU], ids=["swiglu", "gelu"])
@pytest.mark.usefixtures("wgmma")
def test_every_tile_of_gate_and_up_gives_the_same_bits(kernels, memory, monkeypatch, activation):
    from worker.gpu.matmul import glu

    gate, up = (Projection(kernels, memory, Q4_K, (40, COLS), name) for name in ("gate", "up"))
    x = rows_of(70, COLS) * np.array([1, 1e-6, 1e-12, 1e-30, 30, 1e4, 1e30] * 10, np.float32)[:, None]

    def product(tokens):
        pool = GuardedPool()
        rows = glu_rows(pool, x[:tokens], gate, up, activation)
        h = glu(kernels, pool, rows, gate.linear, up.linear, activation)
        pool.check()
        return [h.x.get()]

    gelu = activation is GELU_GLU
    assert len(results_of_all_tiles(kernels, monkeypatch, [Q4_K], product, gated=True, gelu=gelu)) == 1


@pytest.mark.parametrize("kinds", MIXED, ids=lambda kinds: kinds[0].name)
@pytest.mark.usefixtures("wgmma")
def test_q_k_and_v_of_two_types_have_the_same_bits_in_every_tile(kernels, memory, monkeypatch, kinds):
    from worker.gpu.matmul import projections

    parts = [
        Projection(kernels, memory, kind, (rows, 512), f"w{i}")
        for i, (kind, rows) in enumerate(zip(kinds, (150, 9, 130), strict=True))
    ]
    x = rows_of(70, 512)

    def product(tokens):
        pool = GuardedPool()
        ys = projections(kernels, pool, scaled_f16(pool, x[:tokens]), [part.linear for part in parts])
        pool.check()
        for part, y in zip(parts, ys, strict=True):
            assert error(y.get(), part.exact(in_f16(x[:tokens]))) < PREFILL_OWN
        return [y.get() for y in ys]

    assert len(results_of_all_tiles(kernels, monkeypatch, kinds, product)) == 1


@pytest.mark.parametrize("rows", [260, 262], ids=["aligned", "unaligned"])
@pytest.mark.usefixtures("wgmma")
def test_a_block_of_several_tiles_gives_the_bits_of_a_block_a_tile(kernels, memory, monkeypatch, rows):
    from worker.gpu.matmul import matmul

    force_tile(monkeypatch, lambda tiles: next(tile for tile in tiles if tile.tile_n == 128))
    projection, x = Projection(kernels, memory, Q4_K, (rows, 256), bias=True), rows_of(300, 256)
    residual = np.random.default_rng(1).normal(size=(300, rows)).astype(np.float32)
    for addend in (None, residual):
        found = set()
        for processors in (1, 2, 1000):
            monkeypatch.setattr(kernels, "processors", processors)
            pool = GuardedPool()
            real = replace(
                scaled_f16(pool, x), count=pool.put(np.array([150], np.int32))
            )  # no tokens for the last tiles
            y = matmul(kernels, pool, real, projection.linear, None if addend is None else pool.put(addend)).get()
            pool.check()
            exact = projection.exact(in_f16(x[:150])) + (0 if addend is None else addend[:150])
            assert error(y[:150], exact) < PREFILL_OWN
            assert (y[150:].view(np.uint32) == 0xFFFFFFFF).all()
            found.add(y.tobytes())
        assert len(found) == 1


@pytest.mark.parametrize(
    ("kind", "rows", "cols", "tokens", "gated", "fastest"),
    [
        (Q4_K, (2048, 512, 512), 2048, 1024, False, (False, 256)),
        (Q4_K, (2048,), 2048, 1024, False, (False, 128)),
        (Q6_K, (2048,), 8192, 2048, False, (False, 256)),
        (Q4_K, (3072,), 3072, 2048, False, (False, 192)),
        (Q4_K, (8192, 8192), 2048, 128, True, (False, 128)),
        (Q4_K, (2048, 512, 512), 2048, 128, False, (True, 64)),
        (Q6_K, (2048,), 8192, 128, False, (True, 32)),
        (Q6_K, (2048,), 8192, 32, False, (True, 16)),
        (BF16, (2048,), 8192, 2048, False, (False, 128)),
        (F16, (2048,), 8192, 2048, False, (True, 64)),
        (F32, (2048,), 8192, 2048, False, (True, 64)),
    ],
)
def test_the_chosen_tile_is_the_one_that_was_fastest_on_an_h100(kind, rows, cols, tokens, gated, fastest):
    """Measured in docs/notes/prefill.md; those of BF16, F16 and F32 are the largest that they have."""
    from worker.gpu import matmul_wgmma

    tile = matmul_wgmma._tile(kind, rows, cols, tokens, gated=gated)
    assert (tile.short, tile.tile_n) == fastest


@pytest.mark.parametrize(("tokens", "fastest"), [(128, None), (256, None), (512, 128), (1024, 192), (2048, 256)])
def test_the_tile_of_gpt_oss_experts_is_the_one_that_was_fastest_on_an_h100(tokens, fastest):
    from worker.gpu import matmul_wgmma

    assert matmul_wgmma.rows_of_expert_tiles(tokens * 4 / 32) == fastest


def test_all_stages_of_a_tile_fit_the_shared_memory_of_a_block():
    from worker.gpu import matmul_wgmma

    static = {False: 29 << 10, True: 24 << 10}  # tokens with their places, sums of the epilogue and barriers
    assert all(tile.shared_bytes + static[tile.short] <= 227 << 10 for tile in matmul_wgmma._tiles(Q8_0))
