"""Products of every type, both phases, against f64 on the same weights: poisoned results, fenced arrays, odd sizes.

Bounds, relative L2. OWN is the kernel's own error, against f64 on the activations as it gets them. Decode adds exact
integer sums in f32: 2e-6 (f32 types: a chain of at most 2816 fused additions). Prefill rounds scale, minimum and value
of a weight to f16, 2^-11 each: 1e-3, and 2e-3 where a minimum cancels most of scale·code. WHOLE is against f64 on the
activations before rounding: 1 %, the requirement; 8-bit blocks take 0.5 to 0.9 % of it.
"""

from __future__ import annotations

from dataclasses import replace
from operator import itemgetter

import numpy as np
import pytest

from tests.gpu.activations import activations, f32_rows, halved, left_blocks, norm_of, rows_of
from tests.gpu.guarded import GuardedPool
from tests.gpu.weights import Projection, error
from worker.cpu.plain import gated, rms_norm
from worker.cpu.quantized import in_8_bits, in_f16, quantize
from worker.ops import SWIGLU, Activation, Routes
from worker.quants import F32, MXFP4, Q4_K, Q5_0, Q6_K, Q8_0, QUANT_TYPES

EACH_TYPE = pytest.mark.parametrize("kind", QUANT_TYPES, ids=lambda kind: kind.name)
DECODE_OWN, PREFILL_OWN, WHOLE = 3e-6, 2e-3, 1e-2
NORMED_OWN = (
    1e-3  # a code on the edge between two may fall on the other side: x·weight is rounded before 1/rms, not after
)
CLAMPED = Activation(limit=7.0, alpha=1.702)


def seen(x, kind):
    """x as a decode product of this type gets it."""
    return in_8_bits(x) if kind.block_size > 1 else x


# ---- decode


@EACH_TYPE
@pytest.mark.parametrize(
    ("rows", "cols", "tokens"),
    [(1, 256, 1), (37, 256, 3), (130, 2816, 2), (1031, 512, 1), (9000, 256, 1), (9000, 1024, 1), (9000, 2048, 1)],
)
def test_decode_products(kernels, memory, kind, rows, cols, tokens):
    from worker.gpu.matvec import matvec

    pool, projection = GuardedPool(), Projection(kernels, memory, kind, (rows, cols), bias=True)
    x = rows_of(tokens, cols)
    (y,) = matvec(kernels, pool, activations(pool, x), None, [projection.linear])
    pool.check()
    assert error(y.get(), projection.exact(seen(x, kind))) < DECODE_OWN
    assert error(y.get(), projection.exact(x)) < WHOLE


@pytest.mark.parametrize("kinds", [(Q5_0, Q5_0, Q8_0), (Q4_K, Q4_K, Q6_K), (Q8_0, F32), (F32, Q4_K, Q4_K)])
def test_decode_products_of_several_types_in_one_launch(kernels, memory, kinds):
    from worker.gpu.matvec import matvec

    shapes = [(67, 512), (9, 512), (18, 512)]
    parts = [
        Projection(kernels, memory, k, s, f"w{i}", bias=i == 1)
        for i, (k, s) in enumerate(zip(kinds, shapes, strict=False))
    ]
    pool, x = GuardedPool(), rows_of(2, 512)
    results = matvec(kernels, pool, activations(pool, x), None, [part.linear for part in parts])
    pool.check()
    for kind, part, y in zip(kinds, parts, results, strict=True):
        assert error(y.get(), part.exact(seen(x, kind))) < DECODE_OWN


def test_decode_adds_a_residual_and_takes_slices_of_rows(kernels, memory):
    from worker.gpu.matvec import matvec

    projection = Projection(kernels, memory, Q4_K, (96, 512), bias=True)
    pool, x = GuardedPool(), rows_of(3, 512)
    residual = np.random.default_rng(1).normal(size=(3, 31)).astype(np.float32)
    part = projection.linear.rows(40, 71)
    (y,) = matvec(kernels, pool, activations(pool, x), None, [part], pool.put(residual))
    pool.check()
    assert error(y.get(), projection.exact(in_8_bits(x))[:, 40:71] + residual) < DECODE_OWN


@EACH_TYPE
@pytest.mark.parametrize(("rows", "cols", "tokens"), [(19, 256, 2), (1100, 512, 1)])
def test_decode_glu(kernels, memory, kind, rows, cols, tokens):
    from worker.gpu.matvec import glu

    gate, up = (Projection(kernels, memory, kind, (rows, cols), name) for name in ("gate", "up"))
    pool, x = GuardedPool(), rows_of(tokens, cols)
    h = glu(kernels, pool, activations(pool, x), None, gate.linear, up.linear, SWIGLU)
    pool.check()
    assert error(h.x.get(), gated(gate.exact(seen(x, kind)), up.exact(seen(x, kind)), SWIGLU)) < 1e-5
    assert h.q is None  # neither 19 nor 1100 are whole blocks


@EACH_TYPE
@pytest.mark.parametrize("cols", [256, 512 + 1024, 2816])  # each tile
def test_decode_glu_leaves_its_result_as_8_bit_blocks_too(kernels, memory, kind, cols):
    from worker.gpu.matvec import glu

    gate, up = (Projection(kernels, memory, kind, (160, cols), name, bias=True) for name in ("gate", "up"))
    pool, x = GuardedPool(), rows_of(2, cols)
    h = glu(kernels, pool, activations(pool, x), None, gate.linear, up.linear, SWIGLU)
    pool.check()
    assert error(h.x.get(), gated(gate.exact(seen(x, kind)), up.exact(seen(x, kind)), SWIGLU)) < 1e-5
    assert left_blocks(h) == left_blocks(activations(pool, h.x.get()))


@pytest.mark.parametrize("kinds", [(Q4_K, Q6_K), (Q8_0, F32), (F32, Q5_0)], ids=lambda kinds: f"{kinds[0].name}")
def test_decode_glu_of_two_types(kernels, memory, kinds):
    from worker.gpu.matvec import glu

    parts = [Projection(kernels, memory, kind, (45, 1280), name) for kind, name in zip(kinds, "gu", strict=True)]
    pool, x = GuardedPool(), rows_of(3, 1280)
    h = glu(kernels, pool, activations(pool, x), None, parts[0].linear, parts[1].linear, SWIGLU)
    pool.check()
    exact = [part.exact(seen(x, kind)) for part, kind in zip(parts, kinds, strict=True)]
    assert error(h.x.get(), gated(*exact, SWIGLU)) < 1e-5


# ---- the input made ready inside of a decode product


@pytest.mark.parametrize("cols", [32, 896, 2880, 8192])
def test_a_product_quantizes_its_input_like_the_twin(kernels, memory, cols):
    from worker.gpu.matvec import matvec

    projection = Projection(kernels, memory, Q8_0, (50, cols))
    pool, x = GuardedPool(), rows_of(3, cols)
    x[0, :32] = 0 if cols > 32 else x[0, :32]
    (made,) = matvec(kernels, pool, activations(pool, x), None, [projection.linear])
    (own,) = matvec(kernels, pool, f32_rows(pool, x), None, [projection.linear])
    pool.check()
    assert own.get().tobytes() == made.get().tobytes()
    assert quantize(x)[0].any()


@EACH_TYPE
@pytest.mark.parametrize("cols", [256, 2816, 4096 + 1024])
def test_a_product_norms_its_input(kernels, memory, kind, cols):
    from worker.gpu.matvec import glu, matvec

    gate, up = (Projection(kernels, memory, kind, (33, cols), name, bias=True) for name in ("gate", "up"))
    pool, x = GuardedPool(), rows_of(2, cols)
    weight, norm = norm_of(pool, cols)
    n = rms_norm(x, weight, norm.eps)
    bound = NORMED_OWN if kind.block_size > 1 else DECODE_OWN
    (y,) = matvec(kernels, pool, f32_rows(pool, x), norm, [gate.linear])
    assert error(y.get(), gate.exact(seen(n, kind))) < bound
    assert error(y.get(), gate.exact(n)) < WHOLE
    h = glu(kernels, pool, f32_rows(pool, x), norm, gate.linear, up.linear, SWIGLU)
    assert error(h.x.get(), gated(gate.exact(seen(n, kind)), up.exact(seen(n, kind)), SWIGLU)) < 3 * bound
    pool.check()


def test_decode_rows_have_the_same_bits_alone_and_together(kernels, memory):
    from worker.gpu.matvec import matvec

    projection = Projection(kernels, memory, Q6_K, (300, 1280))
    pool, x = GuardedPool(), rows_of(5, 1280)
    (together,) = matvec(kernels, pool, activations(pool, x), None, [projection.linear])
    for t in range(5):
        (alone,) = matvec(kernels, pool, activations(pool, x[t : t + 1]), None, [projection.linear])
        assert alone.get().tobytes() == together.get()[t : t + 1].tobytes()


# ---- prefill


def always(monkeypatch, choose):
    """Matrices take the tile that `choose` takes of their tiles, however many blocks that makes."""
    from worker.gpu import matmul

    monkeypatch.setattr(matmul, "_tile", lambda rows, tokens, *, gated: choose(matmul._tiles(rows, gated=gated)))


@pytest.fixture(params=[0, -1], ids=["largest", "smallest"])
def tiles(request, monkeypatch):
    """Small matrices take large tiles too."""
    always(monkeypatch, itemgetter(request.param))


@EACH_TYPE
@pytest.mark.parametrize(
    ("rows", "cols", "tokens"),
    [(1, 256, 1), (37, 256, 17), (130, 2816, 129), (1600, 1536, 70), (4130, 256, 40), (8200, 256, 40)],
)
def test_prefill_products(kernels, memory, kind, rows, cols, tokens):
    from worker.gpu.matmul import matmul

    pool, projection = GuardedPool(), Projection(kernels, memory, kind, (rows, cols), bias=True)
    x = rows_of(tokens, cols)
    y = matmul(kernels, pool, halved(pool, x), projection.linear)
    pool.check()
    assert error(y.get(), projection.exact(in_f16(x))) < PREFILL_OWN
    assert error(y.get(), projection.exact(x)) < WHOLE


@pytest.mark.parametrize("kind", [kind for kind in QUANT_TYPES if kind.block_size <= 32], ids=lambda kind: kind.name)
@pytest.mark.parametrize("cols", [32, 96, 160])
def test_columns_that_fill_no_whole_step(kernels, memory, kind, cols):
    from worker.gpu.matmul import matmul
    from worker.gpu.matvec import matvec

    pool, projection = GuardedPool(), Projection(kernels, memory, kind, (70, cols))
    x = rows_of(20, cols)
    y = matmul(kernels, pool, halved(pool, x), projection.linear)
    (z,) = matvec(kernels, pool, activations(pool, x), None, [projection.linear])
    pool.check()
    assert error(y.get(), projection.exact(in_f16(x))) < PREFILL_OWN
    assert error(z.get(), projection.exact(seen(x, kind))) < DECODE_OWN


@pytest.mark.parametrize("kind", [Q4_K, MXFP4, F32], ids=lambda kind: kind.name)
@pytest.mark.parametrize("rows", [200, 1600, 4100, 8200])  # of each kind
def test_prefill_rows_have_the_same_bits_wherever_a_call_is_cut(kernels, memory, kind, rows):
    from worker.gpu.matmul import matmul

    projection = Projection(kernels, memory, kind, (rows, 512), bias=True)
    pool, x = GuardedPool(), rows_of(300, 512)
    residual = np.random.default_rng(1).normal(size=(300, rows)).astype(np.float32)
    whole = matmul(kernels, pool, halved(pool, x), projection.linear, pool.put(residual)).get()
    assert error(whole, projection.exact(in_f16(x)) + residual) < PREFILL_OWN
    for step in (16, 64, 77, 1):
        for at in range(0, 300, step) if step > 1 else (0, 127, 128, 299):
            part = slice(at, at + step)
            y = matmul(kernels, pool, halved(pool, x[part]), projection.linear, pool.put(residual[part]))
            assert y.get().tobytes() == whole[part].tobytes()


@EACH_TYPE
def test_every_tile_of_a_matrix_gives_the_same_bits(kernels, memory, monkeypatch, kind):
    from worker.gpu import matmul

    pool, x = GuardedPool(), halved(GuardedPool(), rows_of(70, 768))
    sizes = enumerate((200, 1600, 4100, 8200, 75, 75))
    least, few, many, most, *both = (
        Projection(kernels, memory, kind, (rows, 768), f"w{i}").linear for i, rows in sizes
    )
    products = {
        matmul._LEAST: lambda: matmul.matmul(kernels, pool, x, least),
        matmul._FEW: lambda: matmul.matmul(kernels, pool, x, few),
        matmul._MANY: lambda: matmul.matmul(kernels, pool, x, many),
        matmul._MOST: lambda: matmul.matmul(kernels, pool, x, most),
        matmul._GATED: lambda: matmul.glu(kernels, pool, x, *both, SWIGLU),
    }
    for tiles, product in products.items():
        found = set()
        for i in range(len(tiles)):
            always(monkeypatch, itemgetter(i))
            found.add(product().get().tobytes())
        assert len(found) == 1


@pytest.mark.parametrize("kind", [Q4_K, MXFP4, F32], ids=lambda kind: kind.name)
@pytest.mark.parametrize("rows", [200, 1600, 4100, 8200])
def test_prefill_tokens_beyond_the_real_ones_move_no_bit_and_are_left_alone(kernels, memory, tiles, kind, rows):
    from worker.gpu.matmul import matmul

    projection = Projection(kernels, memory, kind, (rows, 512))
    pool, x = GuardedPool(), rows_of(200, 512)
    whole = matmul(kernels, pool, halved(pool, x), projection.linear).get()
    for count in (1, 63, 64, 130):
        real = replace(halved(pool, x), count=pool.put(np.array([count], np.int32)))
        y = matmul(kernels, pool, real, projection.linear).get()
        assert y[:count].tobytes() == whole[:count].tobytes()
        assert (y[count:].view(np.uint32) == 0xFFFFFFFF).all()


@pytest.mark.parametrize("kinds", [(Q5_0, Q5_0, Q8_0), (Q4_K, Q4_K, Q4_K, Q4_K), (Q8_0, F32)])
def test_prefill_projections_of_one_input(kernels, memory, kinds):
    from worker.gpu.matmul import projections

    shapes = [(67, 512), (9, 512), (130, 512), (64, 512)]
    parts = [
        Projection(kernels, memory, kind, shape, f"w{i}", bias=i == 1)
        for i, (kind, shape) in enumerate(zip(kinds, shapes, strict=False))
    ]
    pool, x = GuardedPool(), rows_of(70, 512)
    results = projections(kernels, pool, halved(pool, x), [part.linear for part in parts])
    pool.check()
    for part, y in zip(parts, results, strict=True):
        assert error(y.get(), part.exact(in_f16(x))) < PREFILL_OWN


@EACH_TYPE
@pytest.mark.parametrize("activation", [SWIGLU, CLAMPED], ids=["swiglu", "clamped"])
def test_prefill_glu(kernels, memory, activation, kind):
    from worker.gpu.matmul import glu

    cols = 512 if kind.block_size > 32 else 320
    gate, up = (Projection(kernels, memory, kind, (75, cols), name, bias=True) for name in ("gate", "up"))
    pool, x = GuardedPool(), rows_of(133, cols) * np.float32(0.3)
    h = glu(kernels, pool, halved(pool, x), gate.linear, up.linear, activation)
    pool.check()
    assert error(h.get(), gated(gate.exact(in_f16(x)), up.exact(in_f16(x)), activation)) < 2 * PREFILL_OWN


def test_prefill_glu_of_two_types(kernels, memory):
    from worker.gpu.matmul import glu

    gate, up = (Projection(kernels, memory, kind, (75, 320), name) for kind, name in ((Q5_0, "gate"), (Q8_0, "up")))
    pool, x = GuardedPool(), rows_of(33, 320) * np.float32(0.3)
    h = glu(kernels, pool, halved(pool, x), gate.linear, up.linear, SWIGLU)
    pool.check()
    assert error(h.get(), gated(gate.exact(in_f16(x)), up.exact(in_f16(x)), SWIGLU)) < 2 * PREFILL_OWN


# ---- experts, both phases


def routes_of(pool, tokens, experts, k, *, only=None):
    """Random distinct experts a token (all tokens the same `only` where given) and weights that sum to 1."""
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
MANY = [*SHAPES, (300, 8, 4, 66, 96, None), (150, 8, 2, 40, 64, (6, 1)), (17, 64, 6, 36, 32, None)]


@pytest.mark.parametrize("kind", [MXFP4, Q8_0, F32], ids=lambda kind: kind.name)
@pytest.mark.parametrize(("tokens", "experts", "k", "f", "d", "only"), SHAPES)
def test_decode_experts(kernels, memory, kind, tokens, experts, k, f, d, only):
    from worker.gpu.matvec import experts_add, glu

    gate, up = (Projection(kernels, memory, kind, (experts, f, d), name, bias=True) for name in ("gate", "up"))
    pool, x = GuardedPool(), rows_of(tokens, d) * np.float32(0.3)
    chosen, weights, routes = routes_of(pool, tokens, experts, k, only=only)
    h = glu(kernels, pool, activations(pool, x), None, gate.linear, up.linear, CLAMPED, routes).x.get()
    assert error(h.reshape(tokens, k, f), exact_glu(seen(x, kind), chosen, gate, up, CLAMPED)) < 1e-5
    wide = rows_of(tokens * k, 32 * f)
    down = Projection(kernels, memory, kind, (experts, d, 32 * f), "down", bias=True)
    residual = np.random.default_rng(2).normal(size=(tokens, d)).astype(np.float32)
    out = experts_add(kernels, pool, activations(pool, wide), routes, down.linear, pool.put(residual))
    pool.check()
    inputs = seen(wide, kind).reshape(tokens, k, -1)
    assert error(out.get(), exact_add(inputs, chosen, weights, down, residual)) < 1e-5


@pytest.mark.parametrize("kind", [MXFP4, Q8_0, F32], ids=lambda kind: kind.name)
@pytest.mark.parametrize(("tokens", "experts", "k", "f", "d", "only"), MANY)
def test_prefill_experts(kernels, memory, kind, tokens, experts, k, f, d, only):
    from worker.gpu.matmul import experts_add, glu, grouped

    gate, up = (Projection(kernels, memory, kind, (experts, f, d), name, bias=True) for name in ("gate", "up"))
    pool, x = GuardedPool(), rows_of(tokens, d) * np.float32(0.3)
    chosen, weights, routes = routes_of(pool, tokens, experts, k, only=only)
    groups = grouped(kernels, pool, routes, experts)
    h = glu(kernels, pool, halved(pool, x), gate.linear, up.linear, CLAMPED, groups).get()
    assert error(h, exact_glu(in_f16(x), chosen, gate, up, CLAMPED)) < 2 * PREFILL_OWN
    wide = rows_of(tokens * k, 64)
    down = Projection(kernels, memory, kind, (experts, d, 64), "down", bias=True)
    residual = np.random.default_rng(2).normal(size=(tokens, d)).astype(np.float32)
    out = experts_add(kernels, pool, halved(pool, wide), routes, groups, down.linear, pool.put(residual))
    pool.check()
    inputs = in_f16(wide).reshape(tokens, k, -1)
    assert error(out.get(), exact_add(inputs, chosen, weights, down, residual)) < PREFILL_OWN


def test_prefill_experts_have_the_same_bits_alone_and_together(kernels, memory):
    from worker.gpu.matmul import experts_add, glu, grouped

    gate, up = (Projection(kernels, memory, MXFP4, (8, 64, 96), name, bias=True) for name in ("gate", "up"))
    down = Projection(kernels, memory, MXFP4, (8, 96, 64), "down", bias=True)
    pool, x, wide = GuardedPool(), rows_of(200, 96), rows_of(800, 64)
    residual = np.random.default_rng(2).normal(size=(200, 96)).astype(np.float32)
    chosen, weights, _ = routes_of(pool, 200, 8, 4)

    def both(part):
        routes = Routes(pool.put(chosen[part]), pool.put(weights[part]))
        groups = grouped(kernels, pool, routes, 8)
        h = glu(kernels, pool, halved(pool, x[part]), gate.linear, up.linear, CLAMPED, groups)
        slots = slice(4 * part.start, 4 * part.stop)
        y = experts_add(kernels, pool, halved(pool, wide[slots]), routes, groups, down.linear, pool.put(residual[part]))
        return h.get(), y.get()

    h, y = both(slice(0, 200))
    for at in range(0, 200, 16):
        part = slice(at, min(at + 16, 200))
        h_part, y_part = both(part)
        assert h_part.tobytes() == h[part].tobytes()
        assert y_part.tobytes() == y[part].tobytes()
