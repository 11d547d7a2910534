"""The norms before an addition and of heads: against their twin, and fused with attention."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from tests.gpu.activations import norm_of, rows_of
from tests.gpu.guarded import GuardedPool
from tests.gpu.test_attention import Bench, Scene, Shape
from worker.cpu.plain import rms_norm
from worker.ops import Attention
from worker.rope import Rope


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("cols", [4, 96, 1024, 2560, 5376, 9248])
def test_normed_rows_are_added_and_the_sum_is_scaled(kernels, cols, scale):
    from worker.gpu.norms import norm_add

    pool, y, residual = GuardedPool(), rows_of(3, cols), np.random.default_rng(1).normal(size=(3, cols))
    residual = residual.astype(np.float32)
    weight, norm = norm_of(pool, cols, 1e-3)
    x = norm_add(kernels, pool, pool.put(y), norm, pool.put(residual), scale=scale).get()
    pool.check()
    np.testing.assert_allclose(x, (residual + rms_norm(y, weight, 1e-3)) * scale, rtol=1e-5, atol=1e-5)
    alone = norm_add(kernels, pool, pool.put(y[1:2]), norm, pool.put(residual[1:2]), scale=scale).get()
    assert alone.tobytes() == x[1:2].tobytes()


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("cols", [4, 96, 1024, 2816, 9248])
def test_normed_branches_are_added_normed_and_added(kernels, cols, scale):
    from worker.gpu.norms import branches_norm_add

    pool, residual = GuardedPool(), np.random.default_rng(1).normal(size=(3, cols)).astype(np.float32)
    a, b = rows_of(3, cols, 1), rows_of(3, cols, 2)
    weights, norms = zip(*(norm_of(pool, cols, eps) for eps in (1e-3, 1e-2, 0.1)), strict=True)

    def on_gpu(rows):
        branches = (pool.put(a[rows]), norms[0]), (pool.put(b[rows]), norms[1])
        return branches_norm_add(kernels, pool, branches, norms[2], pool.put(residual[rows]), scale=scale).get()

    x = on_gpu(slice(3))
    pool.check()
    both = rms_norm(a, weights[0], 1e-3) + rms_norm(b, weights[1], 1e-2)
    np.testing.assert_allclose(x, (residual + rms_norm(both, weights[2], 0.1)) * scale, rtol=1e-5, atol=1e-5)
    assert on_gpu(slice(1, 2)).tobytes() == x[1:2].tobytes()


@dataclass
class Norms:
    """The norms of the heads of D elements, with the weights of queries and keys."""

    pool: GuardedPool
    dim: int
    values: bool

    def __post_init__(self):
        (self.q_weight, self.q_norm), (self.k_weight, self.k_norm) = (
            norm_of(self.pool, self.dim, epsilon, seed) for epsilon, seed in ((1e-3, 1), (1e-6, 2))
        )

    def of(self, spec):
        return replace(spec, q_norm=self.q_norm, k_norm=self.k_norm, v_epsilon=1e-2 if self.values else None)

    def twin(self, q, k, v):
        """q, k, v [T, heads·D], normalized."""
        weights = ((self.q_weight, 1e-3), (self.k_weight, 1e-6), (np.float32(1), 1e-2))
        normed = (
            rms_norm(x.reshape(len(x), -1, self.dim), *norm).reshape(x.shape)
            for x, norm in zip((q, k, v), weights, strict=True)
        )
        return normed if self.values else (*list(normed)[:2], v)


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize(("dim", "heads", "kv_heads"), [(64, 4, 1), (256, 5, 5), (512, 2, 1)])
def test_heads_are_normalized_in_place_and_values_into_a_copy(kernels, dim, heads, kv_heads, values):
    """Values may be the keys, which are read before they are normalized."""
    from worker.gpu.head_norms import normalize_heads

    pool, spec = GuardedPool(), Attention(0, heads, kv_heads, dim, Rope(np.zeros(dim // 2), 4))
    norms, q, k = Norms(pool, dim, values), rows_of(3, heads * dim), rows_of(3, kv_heads * dim, seed=5)
    on_device, keys = pool.put(q), pool.put(k)
    assert normalize_heads(kernels, pool, on_device, keys, keys, spec) == (keys, spec)
    got, without = normalize_heads(kernels, pool, on_device, keys, keys, norms.of(spec))
    pool.check()
    for x, expected in zip((on_device, keys, got), norms.twin(q, k, k), strict=True):
        np.testing.assert_allclose(x.get(), expected, rtol=1e-5, atol=1e-6)
    assert without == spec


class NormsFirst:
    """Attention of either phase that normalizes the heads by a launch of their own."""

    def __init__(self, attention):
        self._attention = attention

    def launch(self, kernels, pool, q, k, v, spec, state):
        from worker.gpu.head_norms import normalize_heads

        v, spec = normalize_heads(kernels, pool, q, k, v, spec)
        return self._attention.launch(kernels, pool, q, k, v, spec, state)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("shape", "values"),
    [
        (Shape(64, 8, 1, rotary_dims=32), True),
        (Shape(96, 2, 2, adjacent=True), False),
        (Shape(128, 8, 2), False),
        (Shape(128, 8, 1, window=60), True),
        (Shape(256, 4, 2, window=140), True),
        (Shape(512, 4, 1, rotary_dims=128), True),
    ],
    ids=str,
)
def test_attention_that_normalizes_heads_gives_the_bits_of_a_launch_before(kernels, memory, shape, values, phase):
    def results(wrap):
        bench = Bench(Scene(shape, 150), kernels, memory, slots=1)
        bench.spec = Norms(bench.pool, shape.dim, values).of(bench.spec)
        bench.prefill_attention = wrap(bench.prefill_attention)
        bench.decode_attention = wrap(bench.decode_attention)
        if phase == "prefill":
            y = [bench.prefill(0, 64), bench.prefill(64, 150)]
        else:
            bench.fill(150)
            y = [bench.decode([position]) for position in (0, 127, 128, 149)]
        bench.pool.check()
        return [each.tobytes() for each in (*y, bench.cache.array.get())]

    assert results(lambda attention: attention) == results(NormsFirst)


def test_rows_from_the_count_on_are_not_written(kernels):
    from worker.gpu.norms import branches_norm_add, norm_add

    pool, y = GuardedPool(), rows_of(5, 96)
    count, norm = pool.put(np.array([2], np.int32)), norm_of(pool, 96, 1e-3)[1]
    branches = (pool.put(y), norm), (pool.put(y), norm)
    for x in (
        norm_add(kernels, pool, pool.put(y), norm, pool.put(y), count).get(),
        branches_norm_add(kernels, pool, branches, norm, pool.put(y), count).get(),
    ):
        assert np.isfinite(x[:2]).all()
        assert (x[2:].view(np.uint32) == 0xFFFFFFFF).all()
