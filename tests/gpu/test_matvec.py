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
from worker.ops import SWIGLU
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


def test_decode_rows_have_the_same_bits_alone_and_together(kernels, memory):
    from worker.gpu.matvec import matvec

    projection = Projection(kernels, memory, Q6_K, (300, 1280))
    pool, x = GuardedPool(), rows_of(5, 1280)
    (together,) = matvec(kernels, pool, q8_activations(pool, x), None, [projection.linear])
    for t in range(5):
        (alone,) = matvec(kernels, pool, q8_activations(pool, x[t : t + 1]), None, [projection.linear])
        assert alone.get().tobytes() == together.get()[t : t + 1].tobytes()
