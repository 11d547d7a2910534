"""Experts' products, both phases, against f64 on the same weights: poisoned results, fenced arrays,
odd sizes. Bounds: `products.py`.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from tests.gpu.activations import glu_rows, norm_of, q8_activations, rows_of, scaled_f16, values_of
from tests.gpu.guarded import GuardedPool
from tests.gpu.products import CLAMPED, PREFILL_OWN, rounded
from tests.gpu.weights import Projection, error
from tests.quantized_ops import in_f16
from worker.cpu.plain import gated
from worker.gpu.activations import Q8Activations
from worker.gpu.matvec_mma import MAX_SHARED
from worker.ops import GELU_GLU, QTensor, Router, Routes
from worker.quants import BF16, F32, IQ4_NL, MXFP4, Q4_K, Q6_K, Q8_0, QUANT_TYPES


def routes_of(pool, tokens, experts, k, *, only=None):
    """Random distinct experts of each token (or `only` for all), and weights that sum to 1."""
    rng = np.random.default_rng([tokens, experts, k])
    chosen = (
        np.stack([rng.permutation(experts)[:k] for _ in range(tokens)]) if only is None else np.tile(only, (tokens, 1))
    )
    weights = rng.dirichlet(np.ones(k), tokens).astype(np.float32)
    chosen = chosen.astype(np.int32)
    return chosen, weights, Routes(pool.put(chosen), pool.put(weights))


def sorted_rows(pool, groups, slots):
    """Rows of slots [T·k, cols] in the groups' order, as the input of their products."""
    return scaled_f16(pool, slots[groups.order.get()])


def sorted_glu(kernels, pool, groups, slots, gate, up, activation):
    """h [T·k, f] of the groups' rows, from those of slots [T·k, cols], by prefill's product."""
    from worker.gpu.matmul import glu

    rows = glu_rows(pool, slots[groups.order.get()], gate, up, activation)
    return values_of(glu(kernels, pool, rows, gate.linear, up.linear, activation, groups), gate.weight.shape[1])


def in_slot_order(groups, rows):
    """The groups' rows [T·k, cols] on the host in order of slots: [T, k, cols]."""
    slots = np.empty_like(rows)
    slots[groups.order.get()] = rows
    return slots.reshape(-1, groups.k, rows.shape[1])


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
    (300, 4, 2, 40, 64, (3, 1)),
    (70, 2, 2, 34, 96, None),
    (280, 2, 2, 34, 160, None),
]


@pytest.mark.parametrize("kind", [MXFP4, Q8_0, IQ4_NL, F32], ids=lambda kind: kind.name)
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


@pytest.mark.parametrize(("experts", "k"), [(5, 5), (32, 4), (33, 1), (256, 16)])
def test_products_choose_the_experts_that_route_chooses(kernels, memory, experts, k):
    from worker.gpu.matvec import RouterLogits, experts_add, glu, route

    gate, up = (
        Projection(kernels, memory, MXFP4, (experts, 34, 64), name, bias=True).linear for name in ("gate", "up")
    )
    down = Projection(kernels, memory, MXFP4, (experts, 20, 64), "down").linear
    pool, rng = GuardedPool(), np.random.default_rng(experts)
    logits = pool.put(np.round(rng.normal(size=(1, experts)) * 3).astype(np.float32))  # with ties
    scales = pool.put(rng.normal(size=experts).astype(np.float32))
    x, wide = q8_activations(pool, rows_of(1, 64)), q8_activations(pool, rows_of(k, 64))
    launched = route(kernels, pool, logits, k, QTensor("scales", (experts,), F32, scales))

    def results(routes):
        h = glu(kernels, pool, x, None, gate, up, CLAMPED, routes)
        return h.x.get().tobytes(), experts_add(kernels, pool, wide, routes, down, None).get().tobytes()

    assert results(RouterLogits(logits, k, scales)) == results(launched)
    pool.check()


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("kind", [MXFP4, Q8_0, IQ4_NL, F32, BF16], ids=lambda kind: kind.name)
@pytest.mark.parametrize(("tokens", "experts", "k", "f", "d", "only"), MANY)
def test_prefill_experts(kernels, memory, kind, tokens, experts, k, f, d, only):
    from worker.gpu.matmul import experts_add, group_routes

    gate, up = (Projection(kernels, memory, kind, (experts, f, d), name, bias=True) for name in ("gate", "up"))
    pool, x = GuardedPool(), rows_of(tokens, d) * np.float32(0.3)
    chosen, weights, routes = routes_of(pool, tokens, experts, k, only=only)
    groups = group_routes(kernels, pool, routes, experts)
    h = sorted_glu(kernels, pool, groups, x.repeat(k, axis=0), gate, up, CLAMPED)
    assert error(in_slot_order(groups, h), exact_glu(in_f16(x), chosen, gate, up, CLAMPED)) < 2 * PREFILL_OWN
    wide = rows_of(tokens * k, 64)
    down = Projection(kernels, memory, kind, (experts, d, 64), "down", bias=True)
    residual = np.random.default_rng(2).normal(size=(tokens, d)).astype(np.float32)
    rows = sorted_rows(pool, groups, wide)
    out = experts_add(kernels, pool, rows, routes, groups, down.linear, pool.put(residual))
    pool.check()
    inputs = in_f16(wide).reshape(tokens, k, -1)
    assert error(out.get(), exact_add(inputs, chosen, weights, down, residual)) < PREFILL_OWN


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("tokens", [16, 40])  # the smallest tiles and the middle ones, beside the largest
def test_prefill_experts_have_the_same_bits_alone_and_together(kernels, memory, tokens):
    from worker.gpu.matmul import experts_add, group_routes

    gate, up = (Projection(kernels, memory, MXFP4, (8, 64, 96), name, bias=True) for name in ("gate", "up"))
    down = Projection(kernels, memory, MXFP4, (8, 96, 64), "down", bias=True)
    pool, x, wide = GuardedPool(), rows_of(200, 96), rows_of(800, 64)
    residual = np.random.default_rng(2).normal(size=(200, 96)).astype(np.float32)
    chosen, weights, _ = routes_of(pool, 200, 8, 4)

    def both(part):
        routes = Routes(pool.put(chosen[part]), pool.put(weights[part]))
        groups = group_routes(kernels, pool, routes, 8)
        h = sorted_glu(kernels, pool, groups, x[part].repeat(4, axis=0), gate, up, CLAMPED)
        rows = sorted_rows(pool, groups, wide[4 * part.start : 4 * part.stop])
        y = experts_add(kernels, pool, rows, routes, groups, down.linear, pool.put(residual[part]))
        return in_slot_order(groups, h), y.get()

    h, y = both(slice(0, 200))
    for at in range(0, 200, tokens):
        part = slice(at, min(at + tokens, 200))
        h_part, y_part = both(part)
        assert h_part.tobytes() == h[part].tobytes()
        assert y_part.tobytes() == y[part].tobytes()


class Layer:
    """The experts of a layer, their router and norm, and one step of decode through them."""

    def __init__(self, kernels, memory, kinds, experts, k, f, d, bias=True, activation=CLAMPED):
        gate, up, down = kinds
        self.kernels, self.k, self.activation = kernels, k, activation
        self.gate = Projection(kernels, memory, gate, (experts, f, d), "gate", bias=bias).linear
        self.up = Projection(kernels, memory, up, (experts, f, d), "up", bias=bias).linear
        self.down = Projection(kernels, memory, down, (experts, d, f), "down", bias=bias).linear
        self.router = Router(Projection(kernels, memory, F32, (experts, d), "router", bias=bias).linear)
        self.norm = norm_of(GuardedPool(), d)[1]

    def alone(self, x, residual, chosen=None, weights=None):
        """Routes, h and x of one row, by the launchers for one row, whose products choose the experts."""
        from worker.gpu import matvec

        pool = GuardedPool()
        rows = Q8Activations(pool.put(x[None]))
        if chosen is None:
            routes = matvec.norm_route(self.kernels, pool, rows.x, self.norm, self.router, self.k)
            choice = matvec.router_logits(self.kernels, pool, rows.x, self.norm, self.router, self.k)
        else:
            routes = choice = Routes(pool.put(chosen[None]), pool.put(weights[None]))
        h = matvec.glu(self.kernels, pool, rows, self.norm, self.gate, self.up, self.activation, choice)
        added = None if residual is None else pool.put(residual[None])
        y = matvec.experts_add(self.kernels, pool, h, choice, self.down, added)
        return routes, h, y

    def together(self, x, residual, chosen=None, weights=None, active=None, wide_pairs=0, max_shared=MAX_SHARED):
        """The same of several rows, grouped by expert.

        `chosen` replaces the router's choice, and then `wide_pairs` the width of the tiles.
        """
        from worker.gpu import decode_experts

        pool = GuardedPool()
        if active is not None:
            active = decode_experts.ActiveRows(*(pool.put(array) for array in active))
        rows = pool.put(x)
        n, routes = decode_experts.norm_route(
            self.kernels, pool, rows, self.norm, self.router, self.k, active, max_shared
        )
        if chosen is not None:
            routes = Routes(pool.put(chosen), pool.put(weights))
            experts = self.router.linear.weight.shape[0]
            tiles = decode_experts.group_pairs(self.kernels, pool, routes, experts, active, wide_pairs, max_shared)
            n = replace(n, tiles=tiles)
        h = decode_experts.experts_glu(self.kernels, pool, n, routes, self.gate, self.up, self.activation)
        added = None if residual is None else pool.put(residual)
        y = decode_experts.experts_add(self.kernels, pool, h, routes, self.down, added)
        pool.check()
        return routes, h.rows, y


def assert_rows_equal(layer, together, x, residual, rows, chosen=None, weights=None):
    """Each of `rows` has the bits that it has alone."""
    routes, h, y = together
    for r in rows:
        mine = (None, None) if chosen is None else (chosen[r], weights[r])
        alone_routes, alone_h, alone_y = layer.alone(x[r], None if residual is None else residual[r], *mine)
        pairs = slice(r * layer.k, (r + 1) * layer.k)
        assert routes.experts.get()[r].tolist() == alone_routes.experts.get()[0].tolist()
        assert routes.weights.get()[r].tobytes() == alone_routes.weights.get()[0].tobytes()
        assert h.x.get()[pairs].tobytes() == alone_h.x.get().tobytes()
        if h.q is not None:
            assert h.q.get()[pairs].tobytes() == alone_h.q.get().tobytes()
            assert h.meta.get()[pairs].tobytes() == alone_h.meta.get().tobytes()
        assert y.get()[r].tobytes() == alone_y.get()[0].tobytes()


def inputs_of(rows, d):
    return rows_of(rows, d) * np.float32(0.3), np.random.default_rng(2).normal(size=(rows, d)).astype(np.float32)


SKEWED = (3, 1, 6, 4)


@pytest.mark.parametrize("rows", [2, 3, 8, 17, 64])
@pytest.mark.parametrize("only", [None, SKEWED], ids=["random", "skewed"])
def test_grouped_experts_have_the_bits_of_each_row_alone(kernels, memory, rows, only):
    layer = Layer(kernels, memory, (MXFP4,) * 3, 8, 4, 96, 64)
    x, residual = inputs_of(rows, 64)
    chosen, weights, _ = routes_of(GuardedPool(), rows, 8, 4, only=only)
    together = layer.together(x, residual, chosen, weights)
    assert_rows_equal(layer, together, x, residual, range(rows), chosen, weights)


@pytest.mark.parametrize("wide_pairs", [16, 32])
@pytest.mark.parametrize(
    ("rows", "f", "d", "only"),
    [
        (5, 512, 512, None),  # tiles of one MMA
        (40, 576, 512, None),  # of two, or up to four
        (24, 512, 576, SKEWED),  # of one and two, or three
        (33, 512, 2880, (2, 5, 0, 7)),  # full tiles and one of a single pair
        (9, 2880, 512, None),
    ],
)
def test_experts_on_tensor_cores_have_the_bits_of_each_row_alone(kernels, memory, rows, f, d, only, wide_pairs):
    layer = Layer(kernels, memory, (MXFP4,) * 3, 8, 4, f, d)
    x, residual = inputs_of(rows, d)
    chosen, weights, _ = routes_of(GuardedPool(), rows, 8, 4, only=only)
    launched = []
    with recorded(layer, launched):
        together = layer.together(x, residual, chosen, weights, wide_pairs=wide_pairs)
    mma = f"experts_mma<{wide_pairs // 8}, "
    assert [name for name in launched if name.startswith("experts_mma")] == [f"{mma}true>", f"{mma}false>"]
    assert_rows_equal(layer, together, x, residual, range(0, rows, 3), chosen, weights)


@pytest.mark.parametrize(
    ("rows", "kernel"),
    [(1, "grouped_experts<MXFP4, "), (2, "experts_mma<2, "), (16, "experts_mma<2, "), (17, "experts_mma<4, ")],
)
def test_the_mean_of_pairs_an_expert_determines_the_kernel(kernels, memory, rows, kernel):
    layer = Layer(kernels, memory, (MXFP4,) * 3, 8, 4, 512, 512)
    x, residual = inputs_of(rows, 512)
    launched = []
    with recorded(layer, launched):
        together = layer.together(x, residual)
    assert [name for name in launched if "experts<" in name or "mma" in name] == [f"{kernel}true>", f"{kernel}false>"]
    assert_rows_equal(layer, together, x, residual, range(0, rows, 5))


@pytest.mark.parametrize("wide_pairs", [16, 32])
def test_experts_on_tensor_cores_have_scales_beyond_the_range_of_one_fma(kernels, memory, wide_pairs):
    layer = Layer(kernels, memory, (MXFP4,) * 3, 4, 2, 512, 512)
    for linear in (layer.gate, layer.up):  # 2¹⁰³ and more, in every second chunk
        linear.weight.data.planes[2][:, 32:64, 1::3] = 233
        linear.weight.data.planes[2][:, 96::7, 15] = 254
    x, residual = inputs_of(6, 512)
    x *= np.float32(1e-30)
    chosen, weights, _ = routes_of(GuardedPool(), 6, 4, 2)
    together = layer.together(x, residual, chosen, weights, wide_pairs=wide_pairs)
    assert np.isfinite(together[2].get()).all()
    assert_rows_equal(layer, together, x, residual, range(6), chosen, weights)


@contextmanager
def recorded(layer, names):
    """Append the names of the kernels that the layer gets."""
    kernels = layer.kernels

    def get(file, expression):
        names.append(expression)
        return kernels.get(file, expression)

    layer.kernels = SimpleNamespace(get=get)
    yield
    layer.kernels = kernels


BLOCK_KINDS = [kind for kind in QUANT_TYPES if kind.block_size > 1]


@pytest.mark.parametrize(
    "kinds",
    [*((kind,) * 3 for kind in BLOCK_KINDS), (F32,) * 3, (Q8_0, MXFP4, Q8_0), (MXFP4, MXFP4, F32)],
    ids=lambda kinds: "-".join(kind.name for kind in kinds),
)
def test_rows_choose_and_compute_their_experts_as_each_does_alone(kernels, memory, kinds):
    layer = Layer(kernels, memory, kinds, 5, 3, 256, 256, bias=False)
    x, residual = inputs_of(7, 256)
    assert_rows_equal(layer, layer.together(x, residual), x, residual, range(7))


@pytest.mark.parametrize("kind", [Q4_K, Q8_0, MXFP4, F32], ids=lambda kind: kind.name)
@pytest.mark.parametrize("rows", [2, 7, 40])
def test_rows_of_a_router_with_its_own_norm_and_scales_compute_as_each_does_alone(kernels, memory, kind, rows):
    layer = Layer(kernels, memory, (kind,) * 3, 5, 3, 256, 512, bias=False, activation=GELU_GLU)
    pool = GuardedPool()
    norm, scales = norm_of(pool, 512, 1e-3)[1], pool.put(np.linspace(0.25, 2, 5, dtype=np.float32))
    layer.router = replace(layer.router, norm=norm, scales=QTensor("scales", (5,), F32, scales))
    x, _ = inputs_of(rows, 512)
    assert_rows_equal(layer, layer.together(x, None), x, None, range(0, rows, 3))


@pytest.mark.parametrize("kind", [Q4_K, Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("tokens", [1, 5])
def test_experts_of_one_row_with_gelu_and_no_residual(kernels, memory, kind, tokens):
    from worker.gpu.matvec import experts_add, glu

    gate, up = (Projection(kernels, memory, kind, (8, 64, 256), name) for name in ("gate", "up"))
    down = Projection(kernels, memory, kind, (8, 40, 256), "down")
    pool, x, wide = GuardedPool(), rows_of(tokens, 256) * np.float32(0.3), rows_of(4 * tokens, 256)
    chosen, weights, routes = routes_of(pool, tokens, 8, 4)
    h = glu(kernels, pool, q8_activations(pool, x), None, gate.linear, up.linear, GELU_GLU, routes).x.get()
    exact = exact_glu(rounded(x, kind), chosen, gate, up, GELU_GLU)
    assert error(h.reshape(tokens, 4, 64), exact) < 1e-5
    out = experts_add(kernels, pool, q8_activations(pool, wide), routes, down.linear, None)
    pool.check()
    assert error(out.get(), exact_add(rounded(wide, kind).reshape(tokens, 4, -1), chosen, weights, down, 0)) < 1e-5


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("kind", [Q4_K, Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("tokens", [3, 240])
def test_prefill_experts_with_gelu_and_no_residual(kernels, memory, kind, tokens):
    from worker.gpu.matmul import experts_add, group_routes

    gate, up = (Projection(kernels, memory, kind, (8, 48, 256), name) for name in ("gate", "up"))
    down = Projection(kernels, memory, kind, (8, 40, 256), "down")
    pool, x, wide = GuardedPool(), rows_of(tokens, 256) * np.float32(0.3), rows_of(3 * tokens, 256)
    chosen, weights, routes = routes_of(pool, tokens, 8, 3)
    groups = group_routes(kernels, pool, routes, 8)
    h = sorted_glu(kernels, pool, groups, x.repeat(3, axis=0), gate, up, GELU_GLU)
    assert error(in_slot_order(groups, h), exact_glu(in_f16(x), chosen, gate, up, GELU_GLU)) < 2 * PREFILL_OWN
    out = experts_add(kernels, pool, sorted_rows(pool, groups, wide), routes, groups, down.linear, None)
    pool.check()
    inputs = in_f16(wide).reshape(tokens, 3, -1)
    assert error(out.get(), exact_add(inputs, chosen, weights, down, 0)) < PREFILL_OWN


@pytest.mark.parametrize(("f", "d"), [(128, 2880), (2880, 96), (64, 512), (64, 544), (32, 1056)])
def test_grouped_experts_of_any_length_of_rows(kernels, memory, f, d):
    layer = Layer(kernels, memory, (MXFP4,) * 3, 6, 2, f, d)
    x, residual = inputs_of(11, d)
    assert_rows_equal(layer, layer.together(x, residual), x, residual, range(11))


@pytest.mark.parametrize("positions", [(4, -1, 0, 7), (-1, -1, -1, -1)])
def test_inactive_rows_are_in_no_group_and_get_zeros(kernels, memory, positions):
    layer = Layer(kernels, memory, (MXFP4,) * 3, 8, 4, 64, 96)
    x, residual = inputs_of(5, 96)
    slots = np.array([3, -1, 1, 0, 2], np.int32)
    positions = np.array(positions, np.int32)
    chosen, weights, _ = routes_of(GuardedPool(), 5, 8, 4)
    together = layer.together(x, residual, chosen, weights, (slots, positions))
    active = [r for r in range(5) if slots[r] >= 0 and positions[slots[r]] >= 0]
    assert_rows_equal(layer, together, x, residual, active, chosen, weights)
    rest = [r for r in range(5) if r not in active]
    assert not together[2].get()[rest].any()
    assert np.isnan(together[1].x.get().reshape(5, -1)[rest]).all()  # not written


UNGROUPED = ("experts_add<3, ", "add_experts")


@pytest.mark.parametrize(
    ("kinds", "f", "max_shared", "launched"),
    [
        ((Q4_K, Q4_K, Q6_K), 14336, MAX_SHARED, ("grouped_experts<Q6_K, false>", "add_experts")),  # as in Mixtral 8x7B
        ((Q4_K, Q4_K, Q6_K), 14336, 163 << 10, UNGROUPED),  # of an A100
        ((Q8_0, Q8_0, Q8_0), 512, 23 << 10, UNGROUPED),
        ((MXFP4, MXFP4, F32), 512, MAX_SHARED, UNGROUPED),
    ],
)
def test_rows_are_grouped_if_shared_memory_holds_them_and_inactive_ones_get_zeros(
    kernels, memory, kinds, f, max_shared, launched
):
    layer = Layer(kernels, memory, kinds, 2, 2, f, 256)
    x, residual = inputs_of(3, 256)
    active = np.array([1, -1, 0], np.int32), np.array([4, 0], np.int32)
    names = []
    with recorded(layer, names):
        together = layer.together(x, residual, active=active, max_shared=max_shared)
    assert names[-2].startswith(launched[0])
    assert names[-1] == launched[1]
    assert_rows_equal(layer, together, x, residual, (0, 2))
    assert not together[2].get()[1].any()


@pytest.mark.parametrize("wide_pairs", [0, 16, 32])
@pytest.mark.parametrize(("rows", "experts", "k"), [(2, 32, 4), (9, 8, 4), (40, 3, 2), (64, 70, 1), (33, 200, 8)])
def test_pairs_are_sorted_by_expert_and_cut_into_tiles(kernels, rows, experts, k, wide_pairs):
    from worker.gpu.decode_experts import group_pairs

    pool = GuardedPool()
    chosen, _, routes = routes_of(pool, rows, experts, k)
    tiles = group_pairs(kernels, pool, routes, experts, None, wide_pairs)
    pool.check()
    order, flat = tiles.order.get(), chosen.reshape(-1)
    assert order.tolist() == np.argsort(flat, kind="stable").tolist()
    tables = [(tiles.table, tiles.parameter(), 8)]
    if wide_pairs:
        tables.append((tiles.wide.table, tiles.parameter(wide=True), wide_pairs))
    for table, parameter, each in tables:
        assert_tiles(table.get(), order, flat, each, int(parameter["chunk_cost"]))


def assert_tiles(table, order, flat, each, chunk_cost):
    """All pairs of `order` are in tiles of one expert and up to `each` pairs, with their costs."""
    at, start = 0, 0
    for tile in table[table["count"] > 0]:
        assert (tile["first"], tile["start"]) == (at, start)
        assert set(flat[order[at : at + tile["count"]]]) == {tile["expert"]}
        at, start = at + tile["count"], start + chunk_cost + tile["count"]
    assert at == len(flat)
    used = sum(-(-np.bincount(flat) // each))
    assert set(table["count"][used:]) == {0}
    assert set(table["start"][used:]) == {start}
