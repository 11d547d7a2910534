"""RoPE tables and rotation against complex arithmetic, at positions beyond 0."""

from __future__ import annotations

import math

import numpy as np
import pytest

from worker.cpu.plain import rotate
from worker.rope import Rope, RopeScaling, frequencies, yarn


@pytest.mark.parametrize("adjacent", [True, False])
def test_rotation_multiplies_each_pair_by_its_complex_phase(adjacent):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 3, 8)).astype(np.float32)
    positions = np.array([1, 7, 100, 511, 3], np.int32)
    rotated = rotate(x, positions, Rope(frequencies(1e4, 8), 512, adjacent=adjacent))
    pairs = x.reshape(5, 3, 4, 2) if adjacent else np.stack([x[..., :4], x[..., 4:]], -1)
    phase = np.exp(1j * positions[:, None, None] * 1e4 ** (-np.arange(0, 8, 2) / 8))
    expected = (pairs[..., 0] + 1j * pairs[..., 1]) * phase
    got = rotated.reshape(5, 3, 4, 2) if adjacent else np.stack([rotated[..., :4], rotated[..., 4:]], -1)
    np.testing.assert_allclose(got[..., 0] + 1j * got[..., 1], expected, atol=2e-6)


def test_tables_have_the_same_bits_as_without_threads():
    inv_freq, context = frequencies(1e4, 64), 10_000
    angles = np.outer(np.arange(context, dtype=np.float64), inv_freq)
    rope = Rope(inv_freq, context, magnitude=1.3)
    assert np.array_equal(rope.cos, (np.cos(angles) * 1.3).astype(np.float32))
    assert np.array_equal(rope.sin, (np.sin(angles) * 1.3).astype(np.float32))


def test_only_the_first_dims_of_a_head_are_rotated():
    x = np.ones((1, 1, 12), np.float32)
    rotated = rotate(x, np.array([9], np.int32), Rope(frequencies(1e4, 8), 16))
    assert (rotated[..., 8:] == 1).all()
    assert (rotated[..., :8] != 1).any()


def test_yarn_keeps_fast_pairs_divides_slow_ones_and_scales_the_magnitude():
    scaling = RopeScaling("yarn", factor=32.0, original_context=4096)
    plain = frequencies(150000.0, 64)
    scaled, magnitude = yarn(plain, 150000.0, scaling, truncate=False)
    assert magnitude == pytest.approx(0.1 * math.log(32) + 1)
    assert scaled[0] == plain[0]
    assert scaled[-1] == pytest.approx(plain[-1] / 32)
    # OpenAI's bounds for gpt-oss: 8.09 and 17.40; rounding them outwards moves the ramp.
    rounded, _ = yarn(plain, 150000.0, scaling, truncate=True)
    assert (scaled != rounded).sum() >= 8
    ramp = (scaled - plain) / (plain / 32 - plain)
    assert np.flatnonzero(ramp > 1e-9)[0] == 9
    assert np.flatnonzero(ramp < 1 - 1e-9)[-1] == 17
