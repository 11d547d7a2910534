"""The norm before an addition against its twin."""

from __future__ import annotations

import numpy as np
import pytest

from tests.gpu.activations import norm_of, rows_of
from tests.gpu.guarded import GuardedPool
from worker.cpu.plain import rms_norm


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("cols", [4, 96, 1024, 2560, 5376, 9248])
def test_normed_rows_are_added_and_the_sum_is_scaled(kernels, cols, scale):
    from worker.gpu.norms import norm_add

    pool, y, residual = GuardedPool(), rows_of(3, cols), np.random.default_rng(1).normal(size=(3, cols))
    residual = residual.astype(np.float32)
    weight, norm = norm_of(pool, cols, 1e-3)
    x = norm_add(kernels, pool, pool.put(y), norm, pool.put(residual), scale=scale).get()
    pool.check()
    np.testing.assert_allclose(x, (residual + rms_norm(y, weight, 1e-3)) * scale, rtol=1e-5, atol=1e-5)
    alone = norm_add(kernels, pool, pool.put(y[1:2]), norm, pool.put(residual[1:2]), scale=scale).get()
    assert alone.tobytes() == x[1:2].tobytes()


def test_rows_from_the_count_on_are_not_written(kernels):
    from worker.gpu.norms import norm_add

    pool, y = GuardedPool(), rows_of(5, 96)
    count = pool.put(np.array([2], np.int32))
    x = norm_add(kernels, pool, pool.put(y), norm_of(pool, 96, 1e-3)[1], pool.put(y), count).get()
    assert np.isfinite(x[:2]).all()
    assert (x[2:].view(np.uint32) == 0xFFFFFFFF).all()
