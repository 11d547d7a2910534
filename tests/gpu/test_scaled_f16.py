"""Scaled f16 rows against their twin: bit for bit without a norm."""

from __future__ import annotations

import numpy as np
import pytest

from tests.gpu.activations import norm_of, values_of
from tests.gpu.guarded import GuardedPool
from tests.quantized_ops import in_f16
from worker.cpu.plain import rms_norm

EPS = 1e-5
SHAPES = [(1, 32), (1, 896), (3, 2880), (2, 576), (5, 64), (2, 8192), (1, 14336)]


def rows_of(shape, seed=0):
    """Rows of very different magnitudes, with outliers and a block of zeros."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=shape) * 10.0 ** rng.integers(-3, 4, (shape[0], 1))).astype(np.float32)
    x[:, 7] *= 50
    x[0, :32] = 0 if shape[1] > 32 else x[0, :32]
    return x


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_scaled_rows_equal_their_twin(kernels, shape, normed):
    from worker.gpu.activations import scale_to_f16

    pool, x = GuardedPool(), rows_of(shape)
    weight, norm = norm_of(pool, shape[1], EPS)
    rows = scale_to_f16(kernels, pool, pool.put(x), norm if normed else None)
    values = values_of(rows, shape[1])
    if normed:
        np.testing.assert_allclose(values, rms_norm(x, weight, EPS), rtol=1e-3)
    else:
        assert np.array_equal(values, in_f16(x))
    pool.check()


def test_padding_rows_are_not_written(kernels):
    from worker.gpu.activations import scale_to_f16

    pool, x = GuardedPool(), rows_of((6, 96))
    count = pool.put(np.array([2], np.int32))
    rows = scale_to_f16(kernels, pool, pool.put(x), None, count, 2)
    assert np.isfinite(rows.x.get()[:4]).all()
    assert (rows.x.get()[4:].view(np.uint16) == 0xFFFF).all()


def test_rows_in_the_order_of_experts_are_those_of_their_tokens(kernels):
    from worker.gpu.activations import scale_to_f16

    pool, x = GuardedPool(), rows_of((5, 96))
    _, norm = norm_of(pool, 96, EPS)
    places = np.random.default_rng(0).permutation(10).astype(np.int32)
    count = pool.put(np.array([4], np.int32))
    plain = scale_to_f16(kernels, pool, pool.put(x), norm)
    rows = scale_to_f16(kernels, pool, pool.put(x), norm, count, 2, pool.put(places))
    pool.check()
    assert rows.x.get()[places[:8]].tobytes() == plain.x.get()[:4].repeat(2, axis=0).tobytes()
    assert rows.scale.get()[places[:8]].tobytes() == plain.scale.get()[:4].repeat(2).tobytes()
    assert (rows.x.get()[places[8:]].view(np.uint16) == 0xFFFF).all()


def test_a_row_of_zeros_stays_zeros(kernels):
    from worker.gpu.activations import scale_to_f16

    pool = GuardedPool()
    scaled_f16 = scale_to_f16(kernels, pool, pool.put(np.zeros((2, 64), np.float32)))
    assert not scaled_f16.x.get().any()
    assert scaled_f16.scale.get().tolist() == [1, 1]
