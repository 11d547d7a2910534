"""Rounding of activations in `tests/quantized_ops.py`, against its error bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.models import cpu_runner, decode, prefill
from tests.quantized_ops import QuantizedOps, in_8_bits, in_f16, quantize
from worker.cpu.threads import Threads
from worker.ops import Phase

FLOATS = st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False)


@given(arrays(np.float32, (2, 64), elements=FLOATS))
def test_each_element_is_within_half_a_step_of_its_block(x):
    q, scale = quantize(x)
    assert q.dtype == np.int8
    assert scale.shape == (2, 2)
    blocks = x.reshape(2, 2, 32).astype(np.float64)
    steps = np.abs(blocks).max(axis=2) / 127
    error = np.abs(q.reshape(2, 2, 32) * scale[..., None].astype(np.float64) - blocks)
    assert (error <= 0.5001 * steps[..., None] + 1e-30).all()


def test_a_block_below_the_smallest_maximum_becomes_zeros():
    x = np.zeros((1, 64), np.float32)
    x[0, 40] = 1e-31
    q, scale = quantize(x)
    assert not q.any()
    assert not scale.any()


def test_the_largest_element_of_a_block_becomes_127():
    x = np.linspace(-3, 5, 32, dtype=np.float32)[None]
    q, scale = quantize(x)
    assert (q[0, 0], q[0, -1]) == (-76, 127)
    assert scale[0, 0] == np.float32(5) / np.float32(127)


@given(arrays(np.float32, (1, 32), elements=FLOATS))
def test_scaled_f16_keeps_eleven_bits_at_every_magnitude(x):
    error = np.abs(in_f16(x).astype(np.float64) - x)
    floor = np.abs(x).max() * 2.0**-34
    assert (error <= np.maximum(np.abs(x) * 2.0**-11, floor)).all()


@pytest.mark.parametrize("name", ["llama", "gpt-oss"])
def test_rounding_changes_the_logits_by_less_than_the_bounds(tiny, name):
    exact, rounded = cpu_runner(tiny(name)), cpu_runner(tiny(name))
    rounded._ops = {phase: QuantizedOps(rounded.cache, phase, Threads(1)) for phase in Phase}
    prompt = prefill(list(range(20, 53)))
    pairs = [
        (runner.logits(prompt), runner.logits(decode(7, 33, prompt.block_tables[0]))) for runner in (exact, rounded)
    ]
    errors = [np.linalg.norm(b - a) / np.linalg.norm(a) for a, b in zip(*pairs, strict=True)]
    assert 0 < errors[0] < 0.01
    assert 0 < errors[1] < 0.08


def test_rounding_is_idempotent():
    x = np.random.default_rng(0).normal(size=(3, 96)).astype(np.float32)
    assert (in_f16(in_f16(x)) == in_f16(x)).all()
    assert np.allclose(in_8_bits(in_8_bits(x)), in_8_bits(x), rtol=1e-6)
