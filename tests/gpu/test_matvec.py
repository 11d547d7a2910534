"""Decode's products of every type against f64 with the same weights: poisoned results, fences,
odd sizes. Bounds: `products.py`.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.gpu.activations import f32_activations, norm_of, q8_activations, q8_bytes, rows_of
from tests.gpu.guarded import GuardedPool
from tests.gpu.products import DECODE_OWN, EACH_TYPE, WHOLE, rounded
from tests.gpu.weights import Projection, error
from tests.quantized_ops import in_8_bits, quantize
from worker.cpu.plain import gated, rms_norm
from worker.ops import GELU_GLU, SWIGLU
from worker.quants import F32, Q4_K, Q5_0, Q6_K, Q8_0

NORMED_OWN = 1e-3
"""A code near a boundary may differ: x·weight is rounded before 1/rms is applied, not after."""


@EACH_TYPE
@pytest.mark.parametrize(
    ("rows", "cols", "tokens"),
    [(1, 256, 1), (37, 256, 3), (130, 2816, 2), (1031, 512, 1), (9000, 256, 1), (9000, 1024, 1), (9000, 2048, 1)],
)
def test_decode_products(kernels, memory, kind, rows, cols, tokens):
    from worker.gpu.matvec import matvec

    pool, projection = GuardedPool(), Projection(kernels, memory, kind, (rows, cols), bias=True)
    x = rows_of(tokens, cols)
    (y,) = matvec(kernels, pool, q8_activations(pool, x), None, [projection.linear])
    pool.check()
    assert error(y.get(), projection.exact(rounded(x, kind))) < DECODE_OWN
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
    results = matvec(kernels, pool, q8_activations(pool, x), None, [part.linear for part in parts])
    pool.check()
    for kind, part, y in zip(kinds, parts, results, strict=True):
        assert error(y.get(), part.exact(rounded(x, kind))) < DECODE_OWN


def test_a_decode_product_adds_a_residual_and_accepts_slices_of_rows(kernels, memory):
    from worker.gpu.matvec import matvec

    projection = Projection(kernels, memory, Q4_K, (96, 512), bias=True)
    pool, x = GuardedPool(), rows_of(3, 512)
    residual = np.random.default_rng(1).normal(size=(3, 31)).astype(np.float32)
    part = projection.linear.rows(40, 71)
    (y,) = matvec(kernels, pool, q8_activations(pool, x), None, [part], pool.put(residual))
    pool.check()
    assert error(y.get(), projection.exact(in_8_bits(x))[:, 40:71] + residual) < DECODE_OWN


@EACH_TYPE
@pytest.mark.parametrize(("rows", "cols", "tokens"), [(19, 256, 2), (1100, 512, 1)])
def test_decode_glu(kernels, memory, kind, rows, cols, tokens):
    from worker.gpu.matvec import glu

    gate, up = (Projection(kernels, memory, kind, (rows, cols), name) for name in ("gate", "up"))
    pool, x = GuardedPool(), rows_of(tokens, cols)
    h = glu(kernels, pool, q8_activations(pool, x), None, gate.linear, up.linear, SWIGLU)
    pool.check()
    assert error(h.x.get(), gated(gate.exact(rounded(x, kind)), up.exact(rounded(x, kind)), SWIGLU)) < 1e-5
    assert h.q is None  # neither 19 nor 1100 is a whole number of blocks


@EACH_TYPE
@pytest.mark.parametrize("cols", [256, 512 + 1024, 2816])  # each tile
def test_decode_glu_also_stores_its_result_as_q8_blocks(kernels, memory, kind, cols):
    from worker.gpu.matvec import glu

    gate, up = (Projection(kernels, memory, kind, (160, cols), name, bias=True) for name in ("gate", "up"))
    pool, x = GuardedPool(), rows_of(2, cols)
    h = glu(kernels, pool, q8_activations(pool, x), None, gate.linear, up.linear, SWIGLU)
    pool.check()
    assert error(h.x.get(), gated(gate.exact(rounded(x, kind)), up.exact(rounded(x, kind)), SWIGLU)) < 1e-5
    assert q8_bytes(h) == q8_bytes(q8_activations(pool, h.x.get()))


@pytest.mark.parametrize("kinds", [(Q4_K, Q6_K), (Q8_0, F32), (F32, Q5_0)], ids=lambda kinds: f"{kinds[0].name}")
def test_decode_glu_of_two_types(kernels, memory, kinds):
    from worker.gpu.matvec import glu

    parts = [Projection(kernels, memory, kind, (45, 1280), name) for kind, name in zip(kinds, "gu", strict=True)]
    pool, x = GuardedPool(), rows_of(3, 1280)
    h = glu(kernels, pool, q8_activations(pool, x), None, parts[0].linear, parts[1].linear, SWIGLU)
    pool.check()
    exact = [part.exact(rounded(x, kind)) for part, kind in zip(parts, kinds, strict=True)]
    assert error(h.x.get(), gated(*exact, SWIGLU)) < 1e-5


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("kinds", [(Q4_K, Q4_K), (Q4_K, Q6_K)], ids=lambda kinds: kinds[1].name)
def test_decode_glu_with_gelu(kernels, memory, kinds, tokens):
    from worker.gpu.matvec import glu

    gate, up = (Projection(kernels, memory, kind, (64, 1280), name) for kind, name in zip(kinds, "gu", strict=True))
    pool, x = GuardedPool(), rows_of(tokens, 1280)
    h = glu(kernels, pool, q8_activations(pool, x), None, gate.linear, up.linear, GELU_GLU)
    pool.check()
    expected = gated(gate.exact(rounded(x, kinds[0])), up.exact(rounded(x, kinds[1])), GELU_GLU)
    assert error(h.x.get(), expected) < 1e-5
    assert q8_bytes(h) == q8_bytes(q8_activations(pool, h.x.get()))


# ---- preparation of the input by a decode product


@pytest.mark.parametrize("cols", [32, 896, 2880, 8192])
def test_a_product_quantizes_its_input_like_the_twin(kernels, memory, cols):
    from worker.gpu.matvec import matvec

    projection = Projection(kernels, memory, Q8_0, (50, cols))
    pool, x = GuardedPool(), rows_of(3, cols)
    x[0, :32] = 0 if cols > 32 else x[0, :32]
    (made,) = matvec(kernels, pool, q8_activations(pool, x), None, [projection.linear])
    (own,) = matvec(kernels, pool, f32_activations(pool, x), None, [projection.linear])
    pool.check()
    assert own.get().tobytes() == made.get().tobytes()
    assert quantize(x)[0].any()


@EACH_TYPE
@pytest.mark.parametrize("cols", [256, 2816, 4096 + 1024])
def test_a_product_applies_the_norm_to_its_input(kernels, memory, kind, cols):
    from worker.gpu.matvec import glu, matvec

    gate, up = (Projection(kernels, memory, kind, (33, cols), name, bias=True) for name in ("gate", "up"))
    pool, x = GuardedPool(), rows_of(2, cols)
    weight, norm = norm_of(pool, cols)
    n = rms_norm(x, weight, norm.eps)
    bound = NORMED_OWN if kind.block_size > 1 else DECODE_OWN
    (y,) = matvec(kernels, pool, f32_activations(pool, x), norm, [gate.linear])
    assert error(y.get(), gate.exact(rounded(n, kind))) < bound
    assert error(y.get(), gate.exact(n)) < WHOLE
    h = glu(kernels, pool, f32_activations(pool, x), norm, gate.linear, up.linear, SWIGLU)
    assert error(h.x.get(), gated(gate.exact(rounded(n, kind)), up.exact(rounded(n, kind)), SWIGLU)) < 3 * bound
    pool.check()


# ---- several rows, each of which has the bits of a product of one row

TOGETHER = pytest.mark.parametrize("tokens", [2, 3, 8, 17])


def equal_alone_and_together(multiply, tokens):
    """`multiply(rows)` returns arrays [T, …] for a slice of the input rows."""
    together = [y.get() for y in multiply(slice(0, tokens))]
    for t in range(tokens):
        for whole, alone in zip(together, multiply(slice(t, t + 1)), strict=True):
            assert alone.get().tobytes() == whole[t : t + 1].tobytes(), f"row {t} of {tokens}"


@EACH_TYPE
@TOGETHER
@pytest.mark.parametrize(("rows", "cols"), [(37, 256), (300, 2816)])
@pytest.mark.parametrize("normed", [False, True])
def test_decode_rows_have_the_same_bits_alone_and_together(kernels, memory, kind, tokens, rows, cols, normed):
    from worker.gpu.matvec import matvec

    pool, projection = GuardedPool(), Projection(kernels, memory, kind, (rows, cols), bias=True)
    x = rows_of(tokens, cols)
    residual = np.random.default_rng(1).normal(size=(tokens, rows)).astype(np.float32)
    norm = norm_of(pool, cols)[1] if normed else None
    given = f32_activations if normed else q8_activations

    def multiply(part):
        return matvec(kernels, pool, given(pool, x[part]), norm, [projection.linear], pool.put(residual[part]))

    equal_alone_and_together(multiply, tokens)
    pool.check()


@EACH_TYPE
@pytest.mark.parametrize("tokens", [2, 3, 8])
@pytest.mark.parametrize(("rows", "cols"), [(101, 256), (33, 2816)])
def test_warps_with_several_weight_rows_keep_the_bits_of_one_row(
    kernels, memory, kind, tokens, rows, cols, monkeypatch
):
    from worker.gpu import matvec as launcher

    monkeypatch.setattr(launcher, "_SMALL_GRID_BLOCKS", 1)  # every row is a row of the same block
    pool, projection = GuardedPool(), Projection(kernels, memory, kind, (rows, cols), bias=True)
    x = rows_of(tokens, cols)

    def multiply(part):
        return launcher.matvec(kernels, pool, q8_activations(pool, x[part]), None, [projection.linear])

    equal_alone_and_together(multiply, tokens)
    pool.check()


@TOGETHER
@pytest.mark.parametrize("kinds", [(Q5_0, Q5_0, Q8_0), (Q4_K, Q4_K, Q6_K), (F32, F32, F32)])
def test_q_k_and_v_of_several_rows_have_the_same_bits_as_alone(kernels, memory, kinds, tokens):
    from worker.gpu.matvec import matvec

    shapes = [(67, 512), (9, 512), (18, 512)]
    parts = [Projection(kernels, memory, k, s, f"w{i}") for i, (k, s) in enumerate(zip(kinds, shapes, strict=True))]
    pool, x = GuardedPool(), rows_of(tokens, 512)
    norm = norm_of(pool, 512)[1]
    linears = [part.linear for part in parts]
    equal_alone_and_together(lambda part: matvec(kernels, pool, f32_activations(pool, x[part]), norm, linears), tokens)
    pool.check()


@EACH_TYPE
@TOGETHER
@pytest.mark.parametrize(("rows", "cols"), [(64, 256), (45, 2816)])
def test_glu_rows_have_the_same_bits_alone_and_together(kernels, memory, kind, tokens, rows, cols):
    from worker.gpu.matvec import glu

    gate, up = (Projection(kernels, memory, kind, (rows, cols), name, bias=True) for name in ("gate", "up"))
    pool, x = GuardedPool(), rows_of(tokens, cols)
    norm = norm_of(pool, cols)[1]

    def multiply(part):
        h = glu(kernels, pool, f32_activations(pool, x[part]), norm, gate.linear, up.linear, SWIGLU)
        return [h.x] if h.q is None else [h.x, h.q, h.meta]

    equal_alone_and_together(multiply, tokens)
    pool.check()


@TOGETHER
@pytest.mark.parametrize("kinds", [(Q4_K, Q6_K), (Q8_0, F32), (F32, Q5_0)], ids=lambda kinds: f"{kinds[0].name}")
def test_glu_rows_of_two_types_have_the_same_bits_as_alone(kernels, memory, kinds, tokens):
    from worker.gpu.matvec import glu

    parts = [Projection(kernels, memory, kind, (64, 1280), name) for kind, name in zip(kinds, "gu", strict=True)]
    pool, x = GuardedPool(), rows_of(tokens, 1280)
    norm = norm_of(pool, 1280)[1]

    def multiply(part):
        linears = (parts[0].linear, parts[1].linear)
        return [glu(kernels, pool, f32_activations(pool, x[part]), norm, *linears, SWIGLU).x]

    equal_alone_and_together(multiply, tokens)
    pool.check()
