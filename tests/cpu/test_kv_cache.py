"""The KV cache of 8 bits on the CPU: its rows by hand, and what a token's bits depend on."""

from __future__ import annotations

import numpy as np
import pytest

from tests.models import cpu_runner, prefill
from worker.cpu.kv_cache import from_q8, q8_rows

PROMPT = [5, 9, 2, 77, 30, 11, 4, 8, 100, 3, 6, 21, 7, 19, 1, 50, 12, 13]


def test_a_row_has_its_greatest_magnitude_as_code_127_and_rounds_to_even():
    rows = q8_rows(np.array([[127, -127, 63.5, 1, 2.5, 0.4, 0, -3]], np.float32))
    assert rows["scale"].tolist() == [64]
    assert rows["codes"].tolist() == [[255, 1, 192, 129, 130, 128, 128, 125]]
    assert from_q8(rows).tolist() == [[127, -127, 64, 1, 2, 0, 0, -3]]


def test_codes_are_those_of_the_rounded_scale_and_an_element_is_off_by_half_a_step():
    x = np.random.default_rng(0).normal(size=(200, 3, 96)).astype(np.float32) * np.float32(0.37)
    rows = q8_rows(x)
    step = rows["scale"].astype(np.float32)[..., None] / 64
    assert np.allclose(step[..., 0], np.abs(x).max(-1) / 127, rtol=2**-11)
    assert (np.abs(from_q8(rows) - x) <= step * 0.57).all()  # an f16 scale may be too small by 2^-11


def test_extremes_are_clamped_zeros_stay_and_a_nan_is_kept():
    rows = q8_rows(np.array([[1e30, -1], [-np.inf, 5], [0, 0], [np.nan, 1]], np.float32))
    assert from_q8(rows)[:3].tolist() == [[65024, 0], [-65024, 0], [0, 0]]
    assert np.isnan(from_q8(rows)[3]).all()


@pytest.mark.parametrize("name", ["qwen2", "phi3", "gpt-oss", "gemma3"])
def test_chunks_and_other_sequences_change_no_bit(name, tiny):
    whole = cpu_runner(tiny(name), kv_type="q8")
    expected = whole.logits(prefill(PROMPT))
    chunked = cpu_runner(tiny(name), kv_type="q8")
    for stop in (16, len(PROMPT)):
        got = chunked.logits(prefill(PROMPT[:stop], 0 if stop == 16 else 16))
    assert np.array_equal(got, expected[16:])
    assert all(np.array_equal(a, b) for a, b in zip(whole.cache.k, chunked.cache.k, strict=True))


def test_logits_are_near_those_with_f32_and_not_equal(tiny):
    exact = cpu_runner(tiny("qwen2")).logits(prefill(PROMPT))
    got = cpu_runner(tiny("qwen2"), kv_type="q8").logits(prefill(PROMPT))
    assert 0 < np.linalg.norm(got - exact) / np.linalg.norm(exact) < 0.05
