"""Norm and Q8 blocks of several rows, by a launch of its own."""

from __future__ import annotations

import pytest

from tests.gpu.activations import f32_activations, norm_of, q8_activations, q8_bytes, rows_of
from tests.gpu.guarded import GuardedPool
from tests.gpu.weights import Projection
from worker.quants import F32, Q8_0

COLUMNS = (32, 896, 4096, 9248)  # less than a warp's share, less and more than a block's
ROWS = 40  # another order of a sum of squares changes the factor of one row in ten


@pytest.mark.parametrize("cols", COLUMNS)
@pytest.mark.parametrize("kind", [Q8_0, F32], ids=lambda kind: kind.name)
def test_a_normalized_row_has_the_bits_of_one_that_its_product_normalizes(kernels, memory, kind, cols):
    from worker.gpu.matvec import matvec

    pool, projection = GuardedPool(), Projection(kernels, memory, kind, (4, cols))
    x, norm = rows_of(ROWS, cols), norm_of(pool, cols)[1]
    (together,) = matvec(kernels, pool, f32_activations(pool, x), norm, [projection.linear])
    for row in range(ROWS):
        (alone,) = matvec(kernels, pool, f32_activations(pool, x[row : row + 1]), norm, [projection.linear])
        assert alone.get().tobytes() == together.get()[row].tobytes()
    pool.check()


@pytest.mark.parametrize("cols", COLUMNS)
def test_rows_without_a_norm_are_quantized_like_the_twin(kernels, cols):
    from worker.gpu.activations import quantize_rows

    pool, x = GuardedPool(), rows_of(3, cols)
    rows = quantize_rows(kernels, pool, pool.put(x), None, q8=True, f32=False)
    assert q8_bytes(rows) == q8_bytes(q8_activations(pool, x))
    assert rows.factor is None
    pool.check()
