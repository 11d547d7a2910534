"""The softcap of logits against its twin."""

from __future__ import annotations

import numpy as np
import pytest

from tests.gpu.guarded import GuardedPool
from worker.cpu.ops import CpuOps


@pytest.mark.parametrize(("rows", "columns"), [(1, 7), (3, 400), (2, 150_000)])
def test_logits_are_limited(kernels, rows, columns):
    from worker.gpu.softcap import softcap

    pool, logits = GuardedPool(), np.random.default_rng(1).normal(size=(rows, columns)).astype(np.float32) * 40
    logits[0, :4] = 1e30, -1e30, 0, 1e-30
    capped = softcap(kernels, pool.put(logits), 30.0).get()
    pool.check()
    np.testing.assert_allclose(capped, CpuOps.softcap(None, logits, 30.0), rtol=1e-6)
    assert capped[0, :3].tolist() == [30, -30, 0]
