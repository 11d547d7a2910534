"""Prefill's products of every type against f64 with the same weights: poisoned results, fences,
odd sizes. Bounds: `products.py`.
"""

from __future__ import annotations

from dataclasses import replace
from operator import itemgetter

import numpy as np
import pytest

from tests.gpu.activations import glu_rows, q8_activations, rows_of, scaled_f16, values_of
from tests.gpu.guarded import GuardedPool
from tests.gpu.products import CLAMPED, DECODE_OWN, EACH_TYPE, PREFILL_OWN, WHOLE, rounded
from tests.gpu.weights import Projection, error
from tests.quantized_ops import in_f16
from worker.cpu.plain import gated
from worker.gpu.layouts import MIXED
from worker.ops import GELU_GLU, SWIGLU
from worker.quants import F32, MXFP4, Q4_K, Q5_0, Q8_0, QUANT_TYPES

BOTH = pytest.mark.usefixtures("products")
"""For tests of every kind of kernels that the device has."""


def force_tile(monkeypatch, choose):
    """Make `choose` select the tile of every matrix, regardless of the number of blocks."""
    from worker.gpu import matmul, matmul_wgmma

    monkeypatch.setattr(matmul, "_tile", lambda rows, tokens, *, gated: choose(matmul._tiles(rows, gated=gated)))
    monkeypatch.setattr(matmul_wgmma, "_tile", lambda kind, *sizes, gated: choose(matmul_wgmma._tiles(kind)))


@pytest.fixture(params=[0, -1], ids=["largest", "smallest"])
def tiles(request, monkeypatch):
    """Use the largest, or the smallest, tile of every matrix."""
    force_tile(monkeypatch, itemgetter(request.param))


@BOTH
@EACH_TYPE
@pytest.mark.parametrize(
    ("rows", "cols", "tokens"),
    [(1, 256, 1), (37, 256, 17), (130, 2816, 129), (1600, 1536, 70), (4130, 256, 40), (8200, 256, 40)],
)
def test_prefill_products(kernels, memory, kind, rows, cols, tokens):
    from worker.gpu.matmul import matmul

    pool, projection = GuardedPool(), Projection(kernels, memory, kind, (rows, cols), bias=True)
    x = rows_of(tokens, cols)
    y = matmul(kernels, pool, scaled_f16(pool, x), projection.linear)
    pool.check()
    assert error(y.get(), projection.exact(in_f16(x))) < PREFILL_OWN
    assert error(y.get(), projection.exact(x)) < WHOLE


@BOTH
@pytest.mark.parametrize("kind", [kind for kind in QUANT_TYPES if kind.block_size <= 32], ids=lambda kind: kind.name)
@pytest.mark.parametrize("cols", [32, 96, 160])
def test_columns_that_are_not_a_multiple_of_a_step(kernels, memory, kind, cols):
    from worker.gpu.matmul import matmul
    from worker.gpu.matvec import matvec

    pool, projection = GuardedPool(), Projection(kernels, memory, kind, (70, cols))
    x = rows_of(20, cols)
    y = matmul(kernels, pool, scaled_f16(pool, x), projection.linear)
    (z,) = matvec(kernels, pool, q8_activations(pool, x), None, [projection.linear])
    pool.check()
    assert error(y.get(), projection.exact(in_f16(x))) < PREFILL_OWN
    assert error(z.get(), projection.exact(rounded(x, kind))) < DECODE_OWN


@BOTH
@pytest.mark.parametrize("kind", [Q4_K, MXFP4, F32], ids=lambda kind: kind.name)
@pytest.mark.parametrize("rows", [200, 1600, 4100, 8200])  # each number of splits
def test_prefill_rows_have_the_same_bits_for_every_chunking(kernels, memory, kind, rows):
    from worker.gpu.matmul import matmul

    projection = Projection(kernels, memory, kind, (rows, 512), bias=True)
    pool, x = GuardedPool(), rows_of(300, 512)
    residual = np.random.default_rng(1).normal(size=(300, rows)).astype(np.float32)
    whole = matmul(kernels, pool, scaled_f16(pool, x), projection.linear, pool.put(residual)).get()
    assert error(whole, projection.exact(in_f16(x)) + residual) < PREFILL_OWN
    for step in (16, 64, 77, 1):
        for at in range(0, 300, step) if step > 1 else (0, 127, 128, 299):
            part = slice(at, at + step)
            y = matmul(kernels, pool, scaled_f16(pool, x[part]), projection.linear, pool.put(residual[part]))
            assert y.get().tobytes() == whole[part].tobytes()


@pytest.mark.usefixtures("mma_sync")
@EACH_TYPE
def test_every_tile_of_a_matrix_gives_the_same_bits(kernels, memory, monkeypatch, kind):
    from worker.gpu import matmul

    sizes = enumerate((200, 1600, 4100, 8200, 75, 75))
    *dense, gate, up = (Projection(kernels, memory, kind, (rows, 768), f"w{i}") for i, rows in sizes)
    eight, four, two, one = (projection.linear for projection in dense)
    pool, x = GuardedPool(), glu_rows(GuardedPool(), rows_of(70, 768), gate, up, SWIGLU)
    products = {
        matmul._TILES_8_SPLITS: lambda: matmul.matmul(kernels, pool, x, eight),
        matmul._TILES_4_SPLITS: lambda: matmul.matmul(kernels, pool, x, four),
        matmul._TILES_2_SPLITS: lambda: matmul.matmul(kernels, pool, x, two),
        matmul._TILES_1_SPLIT: lambda: matmul.matmul(kernels, pool, x, one),
        matmul._GATED_TILES: lambda: matmul.glu(kernels, pool, x, gate.linear, up.linear, SWIGLU).x,
    }
    kernels.prepare(  # in parallel: each takes seconds to compile
        matmul._name(eight.weight.kind, tile, experts=False, gated=tiles is matmul._GATED_TILES)
        for tiles in products
        for tile in tiles
    )
    for tiles, product in products.items():
        found = set()
        for i in range(len(tiles)):
            force_tile(monkeypatch, itemgetter(i))
            found.add(product().get().tobytes())
        assert len(found) == 1


@BOTH
@pytest.mark.parametrize("kind", [Q4_K, MXFP4, F32], ids=lambda kind: kind.name)
@pytest.mark.parametrize("rows", [200, 1600, 4100, 8200])
def test_padding_tokens_of_a_prefill_product_change_no_bit_and_are_not_written(kernels, memory, tiles, kind, rows):
    from worker.gpu.matmul import matmul

    projection = Projection(kernels, memory, kind, (rows, 512))
    pool, x = GuardedPool(), rows_of(200, 512)
    whole = matmul(kernels, pool, scaled_f16(pool, x), projection.linear).get()
    for count in (1, 63, 64, 130):
        real = replace(scaled_f16(pool, x), count=pool.put(np.array([count], np.int32)))
        y = matmul(kernels, pool, real, projection.linear).get()
        assert y[:count].tobytes() == whole[:count].tobytes()
        assert (y[count:].view(np.uint32) == 0xFFFFFFFF).all()


@pytest.mark.usefixtures("mma_sync")
@pytest.mark.parametrize(
    "rows", [(67, 9, 130), (1500, 64, 64), (4000, 100, 100), (8100, 64, 64)]
)  # each number of splits
@pytest.mark.parametrize("kinds", MIXED, ids=lambda kinds: kinds[0].name)
def test_q_k_and_v_of_two_types_have_the_same_bits_in_every_tile(kernels, memory, monkeypatch, kinds, rows):
    from worker.gpu import matmul

    parts = [
        Projection(kernels, memory, kind, (each, 512), f"w{i}")
        for i, (kind, each) in enumerate(zip(kinds, rows, strict=True))
    ]
    x, found, tiles = rows_of(70, 512), set(), matmul._tiles(rows, gated=False)
    kernels.prepare(matmul._name(kinds[0], tile, experts=False, gated=False, last=kinds[2]) for tile in tiles)
    for i in range(len(tiles)):
        force_tile(monkeypatch, itemgetter(i))
        for tokens in (70, 9):
            pool = GuardedPool()
            ys = matmul.projections(kernels, pool, scaled_f16(pool, x[:tokens]), [part.linear for part in parts])
            pool.check()
            for part, y in zip(parts, ys, strict=True):
                assert error(y.get(), part.exact(in_f16(x[:tokens]))) < PREFILL_OWN
            found.add(b"".join(y.get()[:9].tobytes() for y in ys))
    assert len(found) == 1


@BOTH
@pytest.mark.parametrize("kinds", [(Q5_0, Q5_0, Q8_0), (Q4_K, Q4_K, Q4_K, Q4_K), (Q8_0, F32)])
def test_prefill_projections_of_one_input(kernels, memory, kinds):
    from worker.gpu.matmul import projections

    shapes = [(67, 512), (9, 512), (130, 512), (64, 512)]
    parts = [
        Projection(kernels, memory, kind, shape, f"w{i}", bias=i == 1)
        for i, (kind, shape) in enumerate(zip(kinds, shapes, strict=False))
    ]
    pool, x = GuardedPool(), rows_of(70, 512)
    results = projections(kernels, pool, scaled_f16(pool, x), [part.linear for part in parts])
    pool.check()
    for part, y in zip(parts, results, strict=True):
        assert error(y.get(), part.exact(in_f16(x))) < PREFILL_OWN


@BOTH
@EACH_TYPE
@pytest.mark.parametrize("activation", [SWIGLU, CLAMPED], ids=["swiglu", "clamped"])
def test_prefill_glu(kernels, memory, activation, kind):
    from worker.gpu.matmul import glu

    cols = 512 if kind.block_size > 32 else 320
    gate, up = (Projection(kernels, memory, kind, (75, cols), name, bias=True) for name in ("gate", "up"))
    pool, x = GuardedPool(), rows_of(133, cols) * np.float32(0.3)
    h = glu(kernels, pool, glu_rows(pool, x, gate, up, activation), gate.linear, up.linear, activation)
    pool.check()
    exact = gated(gate.exact(in_f16(x)), up.exact(in_f16(x)), activation)
    assert error(values_of(h, 75), exact) < 2 * PREFILL_OWN


@BOTH
@pytest.mark.parametrize("tokens", [3, 133])
def test_prefill_glu_with_gelu(kernels, memory, tokens):
    from worker.gpu.matmul import glu

    gate, up = (Projection(kernels, memory, Q4_K, (75, 512), name, bias=True) for name in ("gate", "up"))
    pool, x = GuardedPool(), rows_of(tokens, 512) * np.float32(0.3)
    h = glu(kernels, pool, glu_rows(pool, x, gate, up, GELU_GLU), gate.linear, up.linear, GELU_GLU)
    pool.check()
    assert error(values_of(h, 75), gated(gate.exact(in_f16(x)), up.exact(in_f16(x)), GELU_GLU)) < 2 * PREFILL_OWN


@BOTH
@pytest.mark.parametrize("activation", [SWIGLU, GELU_GLU], ids=["swiglu", "gelu"])
def test_prefill_glu_of_two_types(kernels, memory, activation):
    from worker.gpu.matmul import glu

    gate, up = (Projection(kernels, memory, kind, (75, 320), name) for kind, name in ((Q5_0, "gate"), (Q8_0, "up")))
    pool, x = GuardedPool(), rows_of(33, 320) * np.float32(0.3)
    h = glu(kernels, pool, glu_rows(pool, x, gate, up, activation), gate.linear, up.linear, activation)
    pool.check()
    exact = gated(gate.exact(in_f16(x)), up.exact(in_f16(x)), activation)
    assert error(values_of(h, 75), exact) < 2 * PREFILL_OWN
