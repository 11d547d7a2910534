"""The router's choice on the GPU against its twin: the same experts with ties, equal weights."""

from __future__ import annotations

import numpy as np
import pytest

from tests.gpu.guarded import GuardedPool
from worker.cpu.plain import top_k
from worker.ops import QTensor
from worker.quants import F32


@pytest.mark.parametrize(
    ("tokens", "experts", "k"), [(1, 32, 4), (5, 8, 4), (3, 8, 8), (7, 33, 2), (2, 200, 32), (1, 1, 1)]
)
@pytest.mark.parametrize("ties", [False, True])
def test_the_choice_and_its_weights_equal_their_twin(kernels, tokens, experts, k, ties):
    from worker.gpu.matvec import route

    logits = np.random.default_rng(experts).normal(size=(tokens, experts)).astype(np.float32) * 3
    if ties:
        logits = np.round(logits)
    pool = GuardedPool()
    routes = route(kernels, pool, pool.put(logits), k)
    chosen, weights = top_k(logits, k)
    assert np.array_equal(routes.experts.get(), chosen)
    np.testing.assert_allclose(routes.weights.get(), weights, rtol=2e-6)
    pool.check()


def test_weights_are_multiplied_by_the_scales_of_their_experts(kernels):
    from worker.gpu.matvec import route

    rng, pool = np.random.default_rng(1), GuardedPool()
    logits, scales = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 33), (33,)))
    routes = route(kernels, pool, pool.put(logits), 4, QTensor("s", (33,), F32, pool.put(scales)))
    chosen, weights = top_k(logits, 4)
    assert np.array_equal(routes.experts.get(), chosen)
    np.testing.assert_allclose(routes.weights.get(), weights * scales[chosen], rtol=2e-6)


def test_negative_and_positive_zero_are_a_tie(kernels):
    from worker.gpu.matvec import route

    pool = GuardedPool()
    routes = route(kernels, pool, pool.put(np.array([[-0.0, 0.0, -1.0, 0.0]], np.float32)), 3)
    assert routes.experts.get().tolist() == [[0, 1, 3]]
