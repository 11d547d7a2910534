"""The router on the GPU against its twins: choices with ties, their weights, slots sorted by expert."""

from __future__ import annotations

import numpy as np
import pytest

from tests.gpu.activations import norm_of, rows_of
from tests.gpu.guarded import GuardedPool
from tests.gpu.weights import Projection
from worker.cpu.plain import top_k
from worker.ops import QTensor, Router, Routes
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


@pytest.mark.parametrize(("tokens", "experts"), [(30, 40), (300, 8), (1100, 8)])  # 40, 6 and 1 blocks a tile of rows
def test_a_row_is_routed_alike_alone_and_among_many(kernels, memory, tokens, experts):
    from worker.gpu.matvec import norm_route

    router = Router(Projection(kernels, memory, F32, (experts, 608), "router", bias=True).linear)
    pool, x = GuardedPool(), rows_of(tokens, 608)
    norm = norm_of(pool, 608)[1]
    together = norm_route(kernels, pool, pool.put(x), norm, router, 4)
    for row in range(0, tokens, 29):
        alone = norm_route(kernels, pool, pool.put(x[row : row + 1]), norm, router, 4)
        assert alone.experts.get()[0].tolist() == together.experts.get()[row].tolist()
        assert alone.weights.get()[0].tobytes() == together.weights.get()[row].tobytes()
    pool.check()


@pytest.mark.parametrize(
    ("tokens", "valid", "experts", "k", "skew"),
    [(1, 1, 4, 4, 1), (9, 5, 32, 4, 1), (300, 300, 32, 4, 1), (700, 641, 128, 8, 3), (1100, 1100, 256, 2, 1)],
)
def test_slots_are_sorted_by_expert_and_cut_into_tiles(kernels, tokens, valid, experts, k, skew):
    from worker.gpu.matmul import group_routes

    rng, pool = np.random.default_rng(tokens), GuardedPool()
    scores = rng.random((tokens, experts)) * np.linspace(1, skew, experts)
    chosen = np.argsort(-scores, axis=1)[:, :k].astype(np.int32)
    routes = Routes(pool.put(chosen), pool.put(np.zeros((tokens, k), np.float32)))
    groups = group_routes(kernels, pool, routes, experts, pool.put(np.array([valid], np.int32)))
    pool.check()
    flat = chosen.reshape(-1)[: valid * k]
    order = np.argsort(flat, kind="stable")
    assert groups.order.get()[: valid * k].tolist() == order.tolist()
    assert groups.places.get()[order].tolist() == list(range(valid * k))
    expected, start, size = [], 0, groups.tile_rows
    for expert, count in enumerate(np.bincount(flat, minlength=experts).tolist()):
        expected += [[expert, start + at, min(size, count - at)] for at in range(0, count, size)]
        start += count
    expected += [[0, 0, 0]] * (len(groups.table) - len(expected))
    assert groups.table.get().tolist() == expected
