"""The inputs that layers have beside the residual against their twins."""

from __future__ import annotations

import numpy as np
import pytest

from tests.gpu.activations import norm_of, rows_of
from tests.gpu.guarded import GuardedPool
from worker.cpu.plain import gated, rms_norm
from worker.ops import GELU_GLU, SWIGLU


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize(("groups", "width"), [(1, 4), (6, 64), (5, 256), (3, 260)])
def test_groups_are_normalized_and_added(kernels, groups, width, counted):
    from worker.gpu.layer_inputs import add_normed_groups

    pool, y = GuardedPool(), rows_of(5, groups * width)
    rows = np.random.default_rng(1).normal(size=y.shape).astype(np.float32)
    weight, norm = norm_of(pool, width, 1e-2)
    count = pool.put(np.array([3], np.int32)) if counted else None
    x = add_normed_groups(kernels, pool.put(y), norm, pool.put(rows), count).get()
    pool.check()
    expected = rows + rms_norm(y.reshape(5, groups, width), weight, 1e-2).reshape(y.shape)
    valid = 3 if counted else 5
    np.testing.assert_allclose(x[:valid], expected[:valid], rtol=1e-5, atol=1e-5)
    assert (x[valid:] == rows[valid:]).all()


@pytest.mark.parametrize("activation", [SWIGLU, GELU_GLU], ids=["swiglu", "gelu"])
@pytest.mark.parametrize(("width", "group"), [(64, 0), (256, 2), (300, 4)])
def test_rows_are_gated_by_one_group_of_the_inputs(kernels, width, group, activation):
    from worker.gpu.layer_inputs import gate_group

    rng, pool = np.random.default_rng(2), GuardedPool()
    y, inputs = (rng.normal(size=size).astype(np.float32) for size in ((4, width), (4, 5 * width)))
    count = pool.put(np.array([3], np.int32))
    h = gate_group(kernels, pool.put(y), pool.put(inputs), group, activation, count).get()
    pool.check()
    expected = gated(y, inputs[:, group * width : (group + 1) * width], activation)
    np.testing.assert_allclose(h[:3], expected[:3], rtol=1e-5, atol=1e-6)
    assert (h[3] == y[3]).all()
