"""The norm before an addition against its twin."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.gpu.activations import norm_of, rows_of
from tests.gpu.guarded import GuardedPool
from worker.cpu.plain import rms_norm
from worker.ops import Attention
from worker.rope import Rope


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


@pytest.mark.parametrize(("dim", "heads"), [(64, 3), (256, 5), (512, 1)])
def test_values_are_normalized_into_a_copy(kernels, dim, heads):
    from worker.gpu.head_norms import normalized_values

    pool, v = GuardedPool(), rows_of(3, heads * dim)
    rope = Rope(np.zeros(dim // 2), 4)
    spec, values = Attention(0, heads, heads, dim, rope, v_epsilon=1e-3), pool.put(v)
    assert normalized_values(kernels, pool, values, replace(spec, v_epsilon=None)) is values
    got = normalized_values(kernels, pool, values, spec).get()
    pool.check()
    expected = rms_norm(v.reshape(3, heads, dim), np.float32(1), 1e-3)
    np.testing.assert_allclose(got, expected.reshape(3, -1), rtol=1e-5, atol=1e-6)
    assert (values.get() == v).all()


def test_rows_from_the_count_on_are_not_written(kernels):
    from worker.gpu.norms import norm_add

    pool, y = GuardedPool(), rows_of(5, 96)
    count = pool.put(np.array([2], np.int32))
    x = norm_add(kernels, pool, pool.put(y), norm_of(pool, 96, 1e-3)[1], pool.put(y), count).get()
    assert np.isfinite(x[:2]).all()
    assert (x[2:].view(np.uint32) == 0xFFFFFFFF).all()
