"""Experts' products, both phases, against f64 on the same weights: poisoned results, fenced arrays,
odd sizes. Bounds: `products.py`.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.gpu.activations import q8_activations, rows_of, scaled_f16
from tests.gpu.guarded import GuardedPool
from tests.gpu.products import CLAMPED, PREFILL_OWN, rounded
from tests.gpu.weights import Projection, error
from tests.quantized_ops import in_f16
from worker.cpu.plain import gated
from worker.ops import Routes
from worker.quants import F32, MXFP4, Q8_0


def routes_of(pool, tokens, experts, k, *, only=None):
    """Random distinct experts of each token (or `only` for all), and weights that sum to 1."""
    rng = np.random.default_rng([tokens, experts, k])
    chosen = (
        np.stack([rng.permutation(experts)[:k] for _ in range(tokens)]) if only is None else np.tile(only, (tokens, 1))
    )
    weights = rng.dirichlet(np.ones(k), tokens).astype(np.float32)
    chosen = chosen.astype(np.int32)
    return chosen, weights, Routes(pool.put(chosen), pool.put(weights))


def exact_glu(x, chosen, gate, up, activation):
    pairs = [[(gate.exact(x[t], e), up.exact(x[t], e)) for e in row] for t, row in enumerate(chosen)]
    return np.array([[gated(g, u, activation) for g, u in row] for row in pairs])


def exact_add(h, chosen, weights, down, residual):
    sums = [
        sum(w * down.exact(h[t, j], e) for j, (w, e) in enumerate(zip(weights[t], chosen[t], strict=True)))
        for t in range(len(h))
    ]
    return residual + np.array(sums)


SHAPES = [(1, 8, 4, 66, 96, None), (3, 5, 3, 40, 64, None), (2, 32, 1, 33, 128, None)]
MANY = [
    *SHAPES,
    (24, 8, 4, 66, 96, None),
    (300, 8, 4, 66, 96, None),
    (150, 8, 2, 40, 64, (6, 1)),
    (17, 64, 6, 36, 32, None),
]


@pytest.mark.parametrize("kind", [MXFP4, Q8_0, F32], ids=lambda kind: kind.name)
@pytest.mark.parametrize(("tokens", "experts", "k", "f", "d", "only"), SHAPES)
def test_decode_experts(kernels, memory, kind, tokens, experts, k, f, d, only):
    from worker.gpu.matvec import experts_add, glu

    gate, up = (Projection(kernels, memory, kind, (experts, f, d), name, bias=True) for name in ("gate", "up"))
    pool, x = GuardedPool(), rows_of(tokens, d) * np.float32(0.3)
    chosen, weights, routes = routes_of(pool, tokens, experts, k, only=only)
    h = glu(kernels, pool, q8_activations(pool, x), None, gate.linear, up.linear, CLAMPED, routes).x.get()
    assert error(h.reshape(tokens, k, f), exact_glu(rounded(x, kind), chosen, gate, up, CLAMPED)) < 1e-5
    wide = rows_of(tokens * k, 32 * f)
    down = Projection(kernels, memory, kind, (experts, d, 32 * f), "down", bias=True)
    residual = np.random.default_rng(2).normal(size=(tokens, d)).astype(np.float32)
    out = experts_add(kernels, pool, q8_activations(pool, wide), routes, down.linear, pool.put(residual))
    pool.check()
    inputs = rounded(wide, kind).reshape(tokens, k, -1)
    assert error(out.get(), exact_add(inputs, chosen, weights, down, residual)) < 1e-5


@pytest.mark.parametrize("kind", [MXFP4, Q8_0, F32], ids=lambda kind: kind.name)
@pytest.mark.parametrize(("tokens", "experts", "k", "f", "d", "only"), MANY)
def test_prefill_experts(kernels, memory, kind, tokens, experts, k, f, d, only):
    from worker.gpu.matmul import experts_add, glu, group_routes

    gate, up = (Projection(kernels, memory, kind, (experts, f, d), name, bias=True) for name in ("gate", "up"))
    pool, x = GuardedPool(), rows_of(tokens, d) * np.float32(0.3)
    chosen, weights, routes = routes_of(pool, tokens, experts, k, only=only)
    groups = group_routes(kernels, pool, routes, experts)
    h = glu(kernels, pool, scaled_f16(pool, x), gate.linear, up.linear, CLAMPED, groups).get()
    assert error(h, exact_glu(in_f16(x), chosen, gate, up, CLAMPED)) < 2 * PREFILL_OWN
    wide = rows_of(tokens * k, 64)
    down = Projection(kernels, memory, kind, (experts, d, 64), "down", bias=True)
    residual = np.random.default_rng(2).normal(size=(tokens, d)).astype(np.float32)
    out = experts_add(kernels, pool, scaled_f16(pool, wide), routes, groups, down.linear, pool.put(residual))
    pool.check()
    inputs = in_f16(wide).reshape(tokens, k, -1)
    assert error(out.get(), exact_add(inputs, chosen, weights, down, residual)) < PREFILL_OWN


@pytest.mark.parametrize("tokens", [16, 40])  # the smallest tiles and the middle ones, beside the largest
def test_prefill_experts_have_the_same_bits_alone_and_together(kernels, memory, tokens):
    from worker.gpu.matmul import experts_add, glu, group_routes

    gate, up = (Projection(kernels, memory, MXFP4, (8, 64, 96), name, bias=True) for name in ("gate", "up"))
    down = Projection(kernels, memory, MXFP4, (8, 96, 64), "down", bias=True)
    pool, x, wide = GuardedPool(), rows_of(200, 96), rows_of(800, 64)
    residual = np.random.default_rng(2).normal(size=(200, 96)).astype(np.float32)
    chosen, weights, _ = routes_of(pool, 200, 8, 4)

    def both(part):
        routes = Routes(pool.put(chosen[part]), pool.put(weights[part]))
        groups = group_routes(kernels, pool, routes, 8)
        h = glu(kernels, pool, scaled_f16(pool, x[part]), gate.linear, up.linear, CLAMPED, groups)
        slots = slice(4 * part.start, 4 * part.stop)
        y = experts_add(
            kernels, pool, scaled_f16(pool, wide[slots]), routes, groups, down.linear, pool.put(residual[part])
        )
        return h.get(), y.get()

    h, y = both(slice(0, 200))
    for at in range(0, 200, tokens):
        part = slice(at, min(at + tokens, 200))
        h_part, y_part = both(part)
        assert h_part.tobytes() == h[part].tobytes()
        assert y_part.tobytes() == y[part].tobytes()
