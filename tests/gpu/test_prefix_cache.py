"""The prefix cache on the GPU: bits after hits of any number of blocks, and time saved.

Times use the full-size files in the worker's cache folder; tests of a missing file are skipped. On
the CPU, `tests/engine/test_prefix_cache.py` counts tokens in place of time.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import pytest

from tests.gpu.full import MODELS, path_of
from tests.gpu.loaded import gpu_runner
from tests.gpu.served import load, settle
from tests.models import engine_of, run
from worker.engine import Sequence
from worker.sampling import Sampling

NAMES = ("qwen2", "phi3", "gpt-oss", "llama3-rope")
WARM = Sampling(temperature=0.8, seed=1234, top_p=0.95, repetition_penalty=1.1, logprobs=3)
PROMPT = np.random.default_rng(3).integers(0, 280, 150).tolist()
OTHER = np.random.default_rng(4).integers(0, 280, 150).tolist()
SHUFFLED = np.random.default_rng(5).permutation(40)
TOKENS, BEGINNING, OWN, REPEATS = 8, 2000, 24, 5
SHARE = 0.4
"""Of the time of the whole prompt; on an H100 23 to 36 % for small models (docs/notes/prefill.md)."""


class Observed:
    """A GPU runner that records its last batch's block table and the logits after each prompt."""

    def __init__(self, runner):
        self.vocab_size, self.kv_blocks, self.slots = runner.vocab_size, runner.kv_blocks, runner.slots
        self.extend, self.stop, self.reset = runner.extend, runner.stop, runner.reset
        self.first_draws, self.step_wait = runner.first_draws, None
        self.prefilled, self.table, self.logits = 0, None, []
        self._runner = runner

    def run(self, chunks, on_launched):
        for chunk in chunks:
            self.table = chunk.block_table
            self.prefilled += len(chunk.tokens)
            self.logits += list(self._runner.logits(chunk.batch()))
        return self._runner.run(chunks, on_launched)

    def kv(self, tokens):
        """The bits of K and V of the sequence's first `tokens` positions."""
        blocks = self._runner.cache.array.get()[:, :, self.table].view(np.uint16)
        return np.moveaxis(blocks, 3, 4).reshape(*blocks.shape[:2], -1, *blocks.shape[3::2])[:, :, :tokens]


@pytest.mark.parametrize("name", NAMES)
def test_after_hits_of_every_block_count_bits_and_tokens_are_those_of_a_fresh_engine(name, tiny, kernels, memory):
    inner, written = gpu_runner(tiny(name), kernels, memory, kv_blocks=40), len(PROMPT) + TOKENS - 1
    fresh = Observed(inner)
    expected = run(engine_of(fresh, chunk=512), Sequence("a", PROMPT, TOKENS, WARM))["a"]
    bits = fresh.kv(written)
    for blocks in range(len(PROMPT) // 16 + 1):
        inner.cache.array.fill(np.nan)
        engine = engine_of(Observed(inner), chunk=64, order=SHUFFLED)
        run(engine, Sequence("before", PROMPT[: 16 * blocks] + OTHER[16 * blocks :], TOKENS, WARM))
        engine._runner = second = Observed(inner)
        assert run(engine, Sequence("a", PROMPT, TOKENS, WARM))["a"] == expected, f"{blocks} blocks"
        assert second.prefilled == len(PROMPT) - 16 * blocks
        np.testing.assert_array_equal(second.logits, fresh.logits)
        np.testing.assert_array_equal(second.kv(written), bits)


@pytest.fixture(params=MODELS)
def full(request, gpu):
    """A full-size model with the prefix cache enabled, loaded after the preceding one is freed."""
    path = path_of(request.param)
    settle()
    return load(path, context=4096, prefix_cache=True)


def test_a_second_job_with_the_same_2000_tokens_has_its_first_token_in_a_fraction_of_the_time(
    full, request, record_property
):
    rng, times = np.random.default_rng(0), []
    for _ in range(REPEATS + 1):
        drawn = rng.integers(0, full.vocab_size - 8, BEGINNING + 2 * OWN).tolist()
        beginning, ends = drawn[:BEGINNING], (drawn[BEGINNING:-OWN], drawn[-OWN:])
        times.append([first_token_s(full.engine, beginning + end) for end in ends])
    first, second = (1e3 * statistics.median(column) for column in zip(*times[1:], strict=True))
    spread = [f"{1e3 * min(column):.2f}–{1e3 * max(column):.2f}" for column in zip(*times[1:], strict=True)]
    record_property(
        f"{request.node.callspec.params['full']} first token, {BEGINNING} of {BEGINNING + OWN} tokens cached",
        f"{second:.2f} ms ({spread[1]}) in place of {first:.2f} ms ({spread[0]}): {100 * second / first:.1f} %",
    )
    assert second < SHARE * first


def first_token_s(engine, prompt):
    """Seconds from `add` to the prompt's only token."""
    began = time.perf_counter()
    engine.add(Sequence("timed", prompt, 1, Sampling(temperature=0)))
    while not engine.idle:
        engine.step()
    return time.perf_counter() - began
