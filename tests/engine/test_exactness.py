"""Ids and bits do not depend on chunks, blocks, other sequences, earlier jobs or a crash."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.models import GREEDY, cpu_runner, engine_of, fill_cache, ids, prefill, run
from worker.engine import Sequence
from worker.sampling import Sampling

NAMES = (
    *("qwen2", "phi3", "gpt-oss", "llama3-rope", "qwen3moe", "granite", "granitemoe-shared", "mistral3"),
    *("gemma3", "gemma4", "gemma4-experts", "gemma4-shared"),
)
WARM = Sampling(temperature=0.8, seed=1234, top_p=0.95, repetition_penalty=1.1)
PROMPT = (np.random.default_rng(3).integers(0, 280, 150)).tolist()


def bits(runner, table):
    """K and V of the blocks that hold the prompt, in the order of its positions."""
    blocks = table[: -(-len(PROMPT) // 16)]
    caches = (*runner.cache.k, *runner.cache.v)
    return np.concatenate([cache[blocks].reshape(-1, *cache.shape[2:])[: len(PROMPT)].ravel() for cache in caches])


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_in_chunks_of_any_size_gives_equal_bits(name, tiny):
    runner = cpu_runner(tiny(name))
    table = np.arange(10, dtype=np.int32)
    whole = runner.logits(prefill(PROMPT, table=table, rows=[len(PROMPT) - 1]))
    expected = bits(runner, table)
    for chunk in (16, 64, 512):
        fill_cache(runner)
        for start in range(0, len(PROMPT), chunk):
            batch = prefill(PROMPT[: start + chunk], start, table=table)
            logits = runner.logits(replace(batch, logit_rows=batch.logit_rows[-1:]))
        np.testing.assert_array_equal(logits, whole)
        np.testing.assert_array_equal(bits(runner, table), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_after_a_cached_prefix_of_any_length_gives_equal_bits(name, tiny):
    runner = cpu_runner(tiny(name))
    table = np.arange(10, dtype=np.int32)
    whole = runner.logits(prefill(PROMPT, table=table, rows=[len(PROMPT) - 1]))
    for cached in range(16, len(PROMPT), 16):
        batch = prefill(PROMPT, cached, table=table)
        np.testing.assert_array_equal(runner.logits(replace(batch, logit_rows=batch.logit_rows[-1:])), whole)


@pytest.mark.parametrize("sampling", [GREEDY, WARM, Sampling(temperature=1.0, seed=9)])
@pytest.mark.parametrize("name", NAMES)
def test_chunks_blocks_and_other_sequences_change_no_token(name, sampling, tiny):
    def answer(**settings):
        runner = cpu_runner(tiny(name), kv_blocks=40)
        return runner, engine_of(runner, **settings)

    def sequence(key="a", prompt=PROMPT):
        return Sequence(key, prompt, 24, sampling)

    expected = ids(run(answer()[1], sequence())["a"])
    shuffled = np.random.default_rng(5).permutation(40)
    assert ids(run(answer(chunk=16, order=shuffled)[1], sequence())["a"]) == expected
    together = run(answer(running=3)[1], sequence("b", PROMPT[5:]), sequence(), sequence("c", PROMPT[::-1]))
    assert ids(together["a"]) == expected


@pytest.mark.parametrize("name", NAMES)
def test_two_jobs_in_a_row_equal_two_fresh_engines(name, tiny):
    first, second = Sequence("a", PROMPT, 20, WARM), Sequence("b", PROMPT[40:90], 20, WARM)
    fresh = [ids(run(engine_of(cpu_runner(tiny(name))), replace(s))[s.id]) for s in (first, second)]
    engine = engine_of(cpu_runner(tiny(name)))
    assert [ids(run(engine, s)[s.id]) for s in (first, second)] == fresh


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("published", [1, 7, 19])
def test_a_worker_that_replays_the_published_ids_draws_the_next_ones(name, published, tiny):
    whole = ids(run(engine_of(cpu_runner(tiny(name))), Sequence("a", PROMPT, 20, WARM))["a"])
    continued = run(engine_of(cpu_runner(tiny(name))), Sequence("a", PROMPT, 20, WARM, replay=whole[:published]))["a"]
    assert ids(continued) == whole
    assert [t.replayed for t in continued].count(True) == published


def test_logits_with_an_f16_cache_are_near_those_with_f32(tiny):
    exact = cpu_runner(tiny("qwen2")).logits(prefill(PROMPT))
    halved = cpu_runner(tiny("qwen2"), kv_type="f16").logits(prefill(PROMPT))
    error = np.linalg.norm(halved - exact) / np.linalg.norm(exact)
    assert 0 < error < 5e-3
