"""Rows made ready for the products, against their twins: bit for bit where no norm comes before, else to a last place.

A block of int8 may differ by one step where a product of f32 roundings falls on the edge between two.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.gpu.activations import values_of
from tests.gpu.guarded import GuardedPool
from worker.cpu.plain import rms_norm
from worker.cpu.quantized import in_f16, quantize
from worker.ops import QTensor, RmsNorm
from worker.quants import F32

EPS = 1e-5
SHAPES = [(1, 32), (1, 896), (3, 2880), (2, 576), (5, 64), (2, 8192), (1, 14336)]


def rows_of(shape, seed=0):
    """Rows of very different sizes, with outliers and a block of zeros."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=shape) * 10.0 ** rng.integers(-3, 4, (shape[0], 1))).astype(np.float32)
    x[:, 7] *= 50
    x[0, :32] = 0 if shape[1] > 32 else x[0, :32]
    return x


def norm_of(pool, cols):
    weight = np.random.default_rng(1).normal(1, 0.25, cols).astype(np.float32)
    return weight, RmsNorm(QTensor("norm", (cols,), F32, pool.put(weight)), EPS)


def unpacked(rows):
    """q in the order of its row, scale and the sums of either half of a block, from the device's layout."""
    q, meta = rows.q.get(), rows.meta.get().view(np.uint8).reshape(*rows.meta.shape, 8)
    halves = q.reshape(len(q), 2, -1, 16)
    blocks = np.concatenate([halves[:, 0], halves[:, 1]], axis=-1)
    return blocks, meta[..., :4].copy().view(np.float32)[..., 0], meta[..., 4:].copy().view(np.int16)


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_without_a_norm_equal_their_twin_bit_for_bit(kernels, shape):
    from worker.gpu.norms import rows_for

    pool, x = GuardedPool(), rows_of(shape)
    rows = rows_for(kernels, pool, pool.put(x), None, quantized=True, plain=False)
    blocks, scale, sums = unpacked(rows)
    q, twin_scale = quantize(x)
    assert np.array_equal(blocks, q.reshape(blocks.shape))
    assert np.array_equal(scale, twin_scale)
    assert np.array_equal(sums, q.reshape(*blocks.shape[:2], 2, 16).sum(axis=-1, dtype=np.int16))
    pool.check()


@pytest.mark.parametrize("shape", SHAPES)
def test_normed_blocks_and_their_f32_form_equal_their_twin(kernels, shape):
    from worker.gpu.norms import rows_for

    pool, x = GuardedPool(), rows_of(shape)
    weight, norm = norm_of(pool, shape[1])
    rows = rows_for(kernels, pool, pool.put(x), norm, quantized=True, plain=True)
    n = rms_norm(x, weight, EPS)
    np.testing.assert_allclose(rows.x.get(), n, rtol=1e-6)
    blocks, scale, _ = unpacked(rows)
    q, twin_scale = quantize(n)
    np.testing.assert_allclose(scale, twin_scale, rtol=1e-6)
    assert np.abs(blocks.astype(int) - q.reshape(blocks.shape)).max() <= 1
    assert (blocks != q.reshape(blocks.shape)).mean() < 1e-3
    pool.check()


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_halved_rows_equal_their_twin(kernels, shape, normed):
    from worker.gpu.halved import halved_rows

    pool, x = GuardedPool(), rows_of(shape)
    weight, norm = norm_of(pool, shape[1])
    rows = halved_rows(kernels, pool, pool.put(x), norm if normed else None)
    values = values_of(rows, shape[1])
    if normed:
        np.testing.assert_allclose(values, rms_norm(x, weight, EPS), rtol=1e-3)
    else:
        assert np.array_equal(values, in_f16(x))
    pool.check()


def test_rows_beyond_the_real_ones_are_left_alone(kernels):
    from worker.gpu.halved import halved_rows

    pool, x = GuardedPool(), rows_of((6, 96))
    count = pool.put(np.array([2], np.int32))
    rows = halved_rows(kernels, pool, pool.put(x), None, count, 2)
    assert np.isfinite(rows.x.get()[:4]).all()
    assert (rows.x.get()[4:].view(np.uint16) == 0xFFFF).all()


def test_a_row_of_zeros_stays_zeros(kernels):
    from worker.gpu.halved import halved_rows
    from worker.gpu.norms import rows_for

    pool = GuardedPool()
    zeros = pool.put(np.zeros((2, 64), np.float32))
    halved = halved_rows(kernels, pool, zeros)
    assert not halved.x.get().any()
    assert halved.scale.get().tolist() == [1, 1]
    assert not unpacked(rows_for(kernels, pool, zeros, None, quantized=True, plain=False))[0].any()


def test_a_row_in_f32_alone_without_a_norm_is_the_row_itself(kernels):
    from worker.gpu.norms import rows_for

    pool = GuardedPool()
    x = pool.put(np.ones((2, 64), np.float32))
    rows = rows_for(kernels, pool, x, None, quantized=False, plain=True)
    assert rows.x is x
    assert rows.q is None
