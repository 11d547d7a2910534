"""Bounds of gated FFNs from the weights, and scales of h that follow, against their NumPy twins."""

from __future__ import annotations

import numpy as np
import pytest

from tests.gpu.activations import norm_of, rows_of, values_of
from tests.gpu.guarded import GuardedPool
from tests.gpu.products import CLAMPED, EACH_TYPE, PREFILL_OWN
from tests.gpu.weights import Projection, upload
from tests.quantized_ops import greatest_norms, h_scales
from worker.cpu.plain import gated, rms_norm
from worker.ops import GELU_GLU, SWIGLU, Activation, Linear, QTensor, RmsNorm
from worker.quants import F32, MXFP4, Q4_K, Q5_0, Q8_0

EXTREMES = np.float32([1, 0, 1e-9, 1e-12, 1e-3, 30, 1e4, 1e15])
"""Magnitudes of rows."""


def put(pool, *bounds):
    return pool.put(np.array(bounds, np.float32))


def normed(kernels, pool, x, bounds, places=None):
    """Rows x after a norm, as the input of a gated FFN, and their values on the host."""
    from worker.gpu.activations import scale_to_f16

    weight, norm = norm_of(pool, x.shape[1])
    copies = 1 if places is None else len(places) // len(x)
    rows = scale_to_f16(
        *(kernels, pool, pool.put(x), norm, None, copies, None if places is None else pool.put(places)),
        glu_bounds=put(pool, *bounds),
    )
    return rows, rms_norm(x, weight, norm.eps)


def powers(h_scale):
    """Exponents of scales, which are powers of two."""
    fraction, exponent = np.frexp(h_scale.get())
    assert (fraction == 0.5).all()
    return exponent - 1


@EACH_TYPE
@pytest.mark.parametrize("shape", [(19, 256), (3, 37, 512)], ids=["matrix", "experts"])
def test_the_greatest_norms_of_rows_equal_the_twin(kernels, memory, kind, shape):
    from worker.gpu.glu_bounds import row_norms

    pool, projection = GuardedPool(), Projection(kernels, memory, kind, shape, bias=True)
    greatest = put(pool, 0, 5, 0, 6)
    row_norms(kernels, projection.linear, greatest)
    pool.check()
    norm, five, bias, six = greatest.get()
    assert (norm, bias) == pytest.approx(greatest_norms(projection.weight, projection.bias), rel=PREFILL_OWN)
    assert (five, six) == (5, 6)


def test_the_bounds_of_a_model_are_those_of_its_weights_or_limits(kernels, memory):
    from worker.gpu.glu_bounds import GluBounds

    first, second = (
        [Projection(kernels, memory, kind, (40, 256), f"{kind.name}{i}") for i in range(2)] for kind in (Q4_K, Q8_0)
    )
    bounds = GluBounds(memory, 2)
    found = [bounds.of(gate.linear, up.linear, SWIGLU) for gate, up in (first, second)]
    limited = bounds.of(first[0].linear, first[1].linear, CLAMPED)
    assert not any(each.get().any() for each in found)
    for _ in range(2):  # a second launch changes nothing
        bounds.launch(kernels)
        for each, (gate, up) in zip(found, (first, second), strict=True):
            norms = [greatest_norms(part.weight, None)[0] for part in (gate, up)]
            assert each.get() == pytest.approx([*norms, 0, 0], rel=PREFILL_OWN)
    assert limited.get() == pytest.approx([0, 0, 7, 8])
    assert bounds.of(first[0].linear, first[1].linear, SWIGLU) is found[0]
    assert bounds.of(second[0].linear, second[1].linear, CLAMPED) is limited
    steep = bounds.of(first[0].linear, first[1].linear, Activation(limit=1.0, alpha=0.1))
    assert steep.get() == pytest.approx([0, 0, 3, 2])


@pytest.mark.parametrize("cols", [96, 1536, 2880, 9600])
@pytest.mark.parametrize("bounds", [(3.7, 0.9, 0, 0), (3.7, 0.9, 2.3, 0.4), (0, 0, 7, 8)])
def test_scales_of_h_equal_their_twin(kernels, cols, bounds):
    pool, x = GuardedPool(), rows_of(8, cols) * EXTREMES[:, None]
    rows, n = normed(kernels, pool, x, bounds)
    pool.check()
    assert powers(rows.h_scale).tolist() == (np.frexp(h_scales(n, bounds))[1] - 1).tolist()


def test_weighted_squares_beyond_f32_leave_a_bound_of_the_norm(kernels):
    """The row is in range before and after the norm."""
    from worker.gpu.activations import scale_to_f16

    pool, x = GuardedPool(), np.full((1, 64), 3e17, np.float32)
    norm = RmsNorm(QTensor("norm", (64,), F32, pool.put(np.full(64, 1e3, np.float32))), 1e-5)
    rows = scale_to_f16(kernels, pool, pool.put(x), norm, glu_bounds=put(pool, 1, 1, 0, 0))
    pool.check()
    least = np.frexp(64 * 1e3**2)[1] - 15  # the squared norm below 2^15
    assert least <= powers(rows.h_scale)[0] <= least + 6


def test_an_infinite_weight_leaves_the_bounds_of_other_rows(kernels, memory):
    from worker.gpu.glu_bounds import row_norms

    pool, values = GuardedPool(), np.ones((3, 64), np.float32)
    values[1, 5] = np.inf
    weight = upload(kernels, memory, F32, values.shape, values.view(np.uint8).reshape(3, -1))
    greatest = put(pool, 0, 0, 0, 0)
    row_norms(kernels, Linear(weight, None), greatest)
    assert greatest.get().tolist() == [8, 0, 0, 0]


def test_blocks_of_gated_products_end_with_a_row_of_h():
    from worker.gpu import matmul, matmul_wgmma

    tiles = [*matmul._GATED_TILES, *(tile for _, tile in matmul._EXPERT_TILES)]
    rows = [tile.warps_m * tile.frags_m * 8 for tile in tiles] + [tile.rows // 2 for tile in matmul_wgmma._TILES]
    assert all(128 % each == 0 for each in rows)


def test_a_gate_and_an_up_of_two_types_may_have_as_many_rows_as_a_batch_has_slots(monkeypatch):
    """A grid has at most 65,535 blocks in y: 4,096 tokens with 16 experts each are more."""
    from worker.gpu import matmul
    from worker.gpu.activations import ScaledF16
    from worker.gpu.launch import dry_run

    grids = []
    monkeypatch.setattr("worker.gpu.launch._no_launch", lambda grid, *_, **__: grids.append(grid))
    monkeypatch.setattr(matmul, "_launch", lambda *_, **__: None)
    gate, up = (Linear(QTensor("w", (768, 2048), kind, None), None) for kind in (Q4_K, Q8_0))

    def forward(kernels, pool):
        x = ScaledF16(pool.empty((65_536, 2048), np.float16), None, None, pool.empty((65_536,)))
        matmul.glu(kernels, pool, x, gate, up, SWIGLU)

    dry_run(forward)
    assert grids == [(65_536, 2)]


def test_scales_of_h_are_stored_at_the_places_of_their_rows(kernels):
    pool, x = GuardedPool(), rows_of(5, 96) * EXTREMES[3:, None]
    places = np.random.default_rng(0).permutation(15).astype(np.int32)
    one, _ = normed(kernels, pool, x, (2, 3, 0, 1))
    rows, _ = normed(kernels, pool, x, (2, 3, 0, 1), places)
    pool.check()
    assert rows.h_scale.get()[places].tolist() == one.h_scale.get().repeat(3).tolist()


@pytest.mark.parametrize("bounds", [(1e30, 1e30, 0, 0), (1e-30, 1e-30, 0, 0), (np.inf, 1, 0, 0), (0, 0, 0, 0)])
def test_bounds_beyond_f32_give_finite_scales(kernels, bounds):
    rows, _ = normed(kernels, GuardedPool(), rows_of(2, 64), bounds)
    assert (np.abs(powers(rows.h_scale)) <= 100).all()


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("activation", [SWIGLU, GELU_GLU, CLAMPED], ids=["swiglu", "gelu", "clamped"])
@pytest.mark.parametrize("kinds", [(Q4_K, Q4_K), (Q5_0, Q8_0), (MXFP4, MXFP4)], ids=["Q4_K", "mixed", "MXFP4"])
@pytest.mark.parametrize("f", [32, 96, 160])
def test_h_of_extreme_rows_is_in_range_and_as_exact_as_the_product(kernels, memory, kinds, activation, f):
    """With the weights' own bounds, and with a row of weights that reaches them."""
    from worker.gpu.glu_bounds import GluBounds
    from worker.gpu.matmul import glu

    bias = activation is CLAMPED
    gate, up = (
        Projection(kernels, memory, kind, (f, 256), name, bias=bias)
        for kind, name in zip(kinds, ("gate", "up"), strict=True)
    )
    x = rows_of(8, 256) * EXTREMES[:, None]
    x[0] = gate.weight[np.linalg.norm(gate.weight, axis=1).argmax()]  # the gate is the bound
    x[2] *= 1e-21  # its squares are below f32
    pool, bounds = GuardedPool(), GluBounds(memory, 1)
    device = bounds.of(gate.linear, up.linear, activation)
    bounds.launch(kernels)
    rows, _ = normed(kernels, pool, x, device.get())
    h = glu(kernels, pool, rows, gate.linear, up.linear, activation)
    pool.check()
    assert (np.abs(h.x.get().astype(np.float32)) < 2.0**15).all()
    n = values_of(rows, 256)
    for found, exact in zip(values_of(h, f), gated(gate.exact(n), up.exact(n), activation), strict=True):
        floor = 1e-9 * np.linalg.norm(exact) + 1e-30
        assert np.linalg.norm(found - exact) <= 3 * PREFILL_OWN * np.linalg.norm(exact) + floor
