"""Decode's products on the int8 tensor cores: the bits of the products of one row, for every type."""

from __future__ import annotations

import numpy as np
import pytest

from tests.gpu.activations import norm_of, q8_activations, q8_tiles, rows_of
from tests.gpu.guarded import GuardedPool
from tests.gpu.weights import Projection
from worker.gpu.layouts import stored_type
from worker.gpu.matvec_mma import (
    GATED_TILES,
    MAX_SHARED,
    TILES,
    chosen_tiles,
    is_supported,
    shared_bytes,
)
from worker.ops import GELU_GLU, SWIGLU, Activation, Linear, QTensor
from worker.quants import F32, IQ2_S, IQ4_XS, Q4_K, Q5_0, Q6_K, Q8_0, QUANT_TYPES

EACH_BLOCK_TYPE = pytest.mark.parametrize(
    "kind", [kind for kind in QUANT_TYPES if kind.block_size > 1], ids=lambda kind: kind.name
)
EACH_TILE = pytest.mark.parametrize("tiles", TILES, ids=str)


def bits(array):
    """The array's values as integers, so that a comparison prints where they differ."""
    return array.get().view(np.uint32)


def assert_same_bits(found, expected):
    np.testing.assert_array_equal(bits(found), bits(expected))


@EACH_BLOCK_TYPE
@pytest.mark.parametrize(("rows", "cols", "tokens"), [(37, 256, 16), (130, 2816, 17), (67, 512, 33)])
def test_products_have_the_bits_of_one_row(kernels, memory, kind, rows, cols, tokens):
    from worker.gpu.matvec import matvec
    from worker.gpu.matvec_mma import matvec_mma

    pool, projection = GuardedPool(), Projection(kernels, memory, kind, (rows, cols), bias=True)
    x = rows_of(tokens, cols)
    residual = pool.put(rows_of(tokens, rows))
    (expected,) = matvec(kernels, pool, q8_activations(pool, x), None, [projection.linear], residual)
    (found,) = matvec_mma(kernels, pool, q8_tiles(pool, x), [projection.linear], residual)
    pool.check()
    assert_same_bits(found, expected)


@EACH_TILE
@pytest.mark.parametrize("kind", [Q8_0, Q4_K, Q6_K], ids=lambda kind: kind.name)
@pytest.mark.parametrize("tokens", [40, 65])
def test_no_tile_changes_a_bit(kernels, memory, kind, tiles, tokens):
    from worker.gpu.matvec import matvec
    from worker.gpu.matvec_mma import matvec_mma

    pool, projection = GuardedPool(), Projection(kernels, memory, kind, (9, 4096), bias=True)
    x = rows_of(tokens, 4096)
    (expected,) = matvec(kernels, pool, q8_activations(pool, x), None, [projection.linear])
    (found,) = matvec_mma(kernels, pool, q8_tiles(pool, x), [projection.linear], tiles=tiles)
    pool.check()
    assert_same_bits(found, expected)


@pytest.mark.parametrize("kind", [Q5_0, Q8_0, Q4_K, Q6_K, IQ4_XS, IQ2_S], ids=lambda kind: kind.name)
@pytest.mark.parametrize(("split_k", "cols"), [(1, 896), (2, 2048), (4, 4096), (8, 8192), (16, 12288)])
def test_every_split_of_k_has_the_bits_of_one_row(kernels, memory, kind, split_k, cols):
    from worker.gpu.matvec import matvec, split_k_of
    from worker.gpu.matvec_mma import matvec_mma

    if cols % kind.block_size:
        cols = 768
    pool, projection = GuardedPool(), Projection(kernels, memory, kind, (9, cols))
    assert split_k_of([projection.linear]) == split_k
    x = rows_of(16, cols)
    (expected,) = matvec(kernels, pool, q8_activations(pool, x), None, [projection.linear])
    for tiles in (t for t in TILES if t.tokens == 16):
        (found,) = matvec_mma(kernels, pool, q8_tiles(pool, x), [projection.linear], tiles=tiles)
        assert_same_bits(found, expected)
    pool.check()


@pytest.mark.parametrize(("cols", "split_k"), [(4864, 8), (17408, 16)], ids=["empty splits", "a longer first split"])
def test_splits_of_different_lengths_have_the_bits_of_one_row(kernels, memory, cols, split_k):
    from worker.gpu.matvec import matvec, split_k_of
    from worker.gpu.matvec_mma import matvec_mma

    pool, projection = GuardedPool(), Projection(kernels, memory, Q8_0, (9, cols))
    assert split_k_of([projection.linear]) == split_k
    x = rows_of(33, cols)
    (expected,) = matvec(kernels, pool, q8_activations(pool, x), None, [projection.linear])
    for tiles in (t for t in TILES if t.tokens <= 64):
        (found,) = matvec_mma(kernels, pool, q8_tiles(pool, x), [projection.linear], tiles=tiles)
        assert_same_bits(found, expected)
    pool.check()


@pytest.mark.parametrize("cols", [32, 64, 96, 480, 896, 2880])
def test_rows_of_any_number_of_units_have_the_bits_of_one_row(kernels, memory, cols):
    from worker.gpu.matvec import matvec
    from worker.gpu.matvec_mma import matvec_mma

    pool, projection = GuardedPool(), Projection(kernels, memory, Q5_0, (70, cols), bias=True)
    x = rows_of(20, cols)
    (expected,) = matvec(kernels, pool, q8_activations(pool, x), None, [projection.linear])
    (found,) = matvec_mma(kernels, pool, q8_tiles(pool, x), [projection.linear])
    pool.check()
    assert_same_bits(found, expected)


@pytest.mark.parametrize("kinds", [(Q5_0, Q5_0, Q8_0), (Q4_K, Q4_K, Q6_K), (Q8_0, Q8_0, Q8_0)])
def test_several_projections_share_the_splits_of_one_row(kernels, memory, kinds):
    from worker.gpu.matvec import matvec
    from worker.gpu.matvec_mma import matvec_mma

    pool, x = GuardedPool(), rows_of(18, 2048)
    shapes = [(67, 2048), (9, 2048), (18, 2048)]
    parts = [
        Projection(kernels, memory, k, s, f"w{i}", bias=i == 1).linear
        for i, (k, s) in enumerate(zip(kinds, shapes, strict=True))
    ]
    expected = matvec(kernels, pool, q8_activations(pool, x), None, parts)
    found = matvec_mma(kernels, pool, q8_tiles(pool, x), parts)
    pool.check()
    for f, e in zip(found, expected, strict=True):
        assert_same_bits(f, e)


def test_the_factor_of_a_row_is_applied_to_its_sums(kernels, memory):
    from worker.gpu.matvec_mma import glu_mma, matvec_mma

    gate, up = (Projection(kernels, memory, Q4_K, (64, 512), name).linear for name in ("gate", "up"))
    pool, x = GuardedPool(), rows_of(19, 512)
    factor = np.random.default_rng(2).uniform(0.1, 2, 19).astype(np.float32)
    (plain,), (found,) = (matvec_mma(kernels, pool, q8_tiles(pool, x, each), [gate]) for each in (None, factor))
    exact = plain.get().astype(np.float64) * factor[:, None]
    np.testing.assert_array_equal(found.get(), exact.astype(np.float32))
    twos = np.full(19, 2, np.float32)
    found, expected = (
        glu_mma(kernels, pool, q8_tiles(pool, x, twos), gate, up, SWIGLU),
        glu_mma(kernels, pool, q8_tiles(pool, x * np.float32(2)), gate, up, SWIGLU),
    )
    assert_same_bits(found.x, expected.x)
    pool.check()


@EACH_BLOCK_TYPE
@pytest.mark.parametrize(("rows", "cols", "tokens"), [(19, 256, 16), (160, 1280, 33)])
def test_the_gated_product_has_the_bits_of_one_row(kernels, memory, kind, rows, cols, tokens):
    from worker.gpu.matvec import glu
    from worker.gpu.matvec_mma import glu_mma

    gate, up = (
        Projection(kernels, memory, kind, (rows, cols), name, bias=rows == 160).linear for name in ("gate", "up")
    )
    pool, activation = GuardedPool(), SWIGLU if rows == 19 else Activation(limit=7.0, alpha=1.702)
    x = rows_of(tokens, cols)
    expected = glu(kernels, pool, q8_activations(pool, x), None, gate, up, activation)
    for tiles in (t for t in GATED_TILES if t.tokens <= max(tokens, 16)):
        found = glu_mma(kernels, pool, q8_tiles(pool, x), gate, up, activation, tiles=tiles)
        pool.check()
        assert_same_bits(found.x, expected.x)
        if rows % 32 == 0:
            assert_same_tiles(found, q8_tiles(pool, expected.x.get()))
        else:
            assert found.q is None


@pytest.mark.parametrize("rows", [19, 160])
def test_the_product_gated_by_gelu_has_the_bits_of_one_row(kernels, memory, rows):
    from worker.gpu.matvec import glu
    from worker.gpu.matvec_mma import glu_mma

    gate, up = (Projection(kernels, memory, Q4_K, (rows, 512), name).linear for name in ("gate", "up"))
    pool, x = GuardedPool(), rows_of(16, 512)
    expected = glu(kernels, pool, q8_activations(pool, x), None, gate, up, GELU_GLU)
    for tiles in (t for t in GATED_TILES if t.tokens == 16):
        found = glu_mma(kernels, pool, q8_tiles(pool, x), gate, up, GELU_GLU, tiles=tiles)
        pool.check()
        assert_same_bits(found.x, expected.x)


def assert_same_tiles(found, expected):
    np.testing.assert_array_equal(found.q.get(), expected.q.get())
    assert_same_bits(found.meta, expected.meta)


@pytest.mark.parametrize(("tokens", "cols"), [(16, 64), (21, 896), (33, 4096), (2, 9248)])
def test_tiles_hold_the_values_of_q8_blocks(kernels, tokens, cols):
    from worker.gpu.activations import quantize_rows, quantize_tiles

    pool, x = GuardedPool(), rows_of(tokens, cols)
    found = quantize_tiles(kernels, pool, pool.put(x), None)
    pool.check()
    assert_same_tiles(found, q8_tiles(pool, x))
    assert found.factor is None
    weight, norm = norm_of(pool, cols)
    found = quantize_tiles(kernels, pool, pool.put(x), norm)
    expected = quantize_rows(kernels, pool, pool.put(x), norm, q8=True, f32=False)
    pool.check()
    assert_same_bits(found.factor, expected.factor)
    assert_same_tiles(found, q8_tiles(pool, x * weight))


def test_a_row_has_the_same_bits_in_any_batch_and_any_place(kernels, memory):
    from worker.gpu.matvec import matvec
    from worker.gpu.matvec_mma import matvec_mma

    pool, projection = GuardedPool(), Projection(kernels, memory, Q6_K, (300, 1280))
    x = rows_of(48, 1280)
    (together,) = matvec_mma(kernels, pool, q8_tiles(pool, x), [projection.linear])
    for t in (0, 17, 47):
        (alone,) = matvec(kernels, pool, q8_activations(pool, x[t : t + 1]), None, [projection.linear])
        np.testing.assert_array_equal(bits(alone)[0], bits(together)[t])


@EACH_BLOCK_TYPE
@EACH_TILE
def test_the_blocks_of_a_multiprocessor_fit_its_shared_memory(kind, tiles):
    size = shared_bytes(stored_type(kind), tiles)
    assert size <= MAX_SHARED
    assert tiles.resident * (size + 1024) <= 228 << 10


@EACH_BLOCK_TYPE
@pytest.mark.parametrize("gated", [False, True])
def test_a_device_with_less_shared_memory_gets_tiles_that_fit(kind, gated):
    kind = stored_type(kind)
    linears = [Linear(QTensor("w", (8192, 2048), kind, None))] * 2
    tiles = GATED_TILES if gated else TILES
    for tokens in (16, 33, 64, 256):
        for max_shared in (99 << 10, 163 << 10, MAX_SHARED):
            chosen = chosen_tiles(tiles, linears, tokens, 1, max_shared, gated=gated)
            assert shared_bytes(kind, chosen) <= max_shared
    assert chosen_tiles(tiles, linears, 256, 1, MAX_SHARED, gated=gated).is_wide


def test_weights_that_no_tile_serves_are_not_supported():
    def linear(kind):
        return Linear(QTensor("w", (64, 256), kind, None))

    assert is_supported([linear(Q4_K), linear(Q6_K)])
    assert is_supported([linear(Q4_K), linear(Q4_K)], gated=True)
    assert not is_supported([linear(Q4_K), linear(Q6_K)], gated=True)
    assert not is_supported([linear(Q4_K), linear(F32)])
