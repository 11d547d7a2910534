"""Jobs of mixed lengths leave memory as it was, to the byte: accounted, and by the driver's figure."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from tests.engine.random_jobs import random_jobs, run_jobs
from tests.gpu.full import path_of
from tests.gpu.served import answer, device_bytes, load, settle
from tests.grammars import ListGrammar
from tests.models import free_kv_blocks, run
from worker.engine import Sequence
from worker.sampling import Sampling

JOBS = 100
MANY_JOBS, RUNNING = 1000, 64
KINDS = (
    Sampling(temperature=0),
    Sampling(temperature=0.8, seed=3, top_p=0.9, top_k=40),
    Sampling(temperature=1.0, seed=4, min_p=0.05, logprobs=20),
    Sampling(temperature=0.7, seed=5, repetition_penalty=1.2, presence_penalty=0.5, penalize_prompt=True),
    Sampling(temperature=0.9, seed=6, logit_bias={5: 2.0, 7: -100.0}),
    Sampling(temperature=0.9, seed=7, grammar=ListGrammar(((290, 300, 301),), 302)),
)


@pytest.mark.parametrize("name", ["gpt-oss", "smollm2"])
def test_a_hundred_jobs_leave_memory_at_its_baseline_to_the_byte(name, request, gpu, tiny):
    path = request.getfixturevalue("smollm2_here") if name == "smollm2" else tiny(name)
    loaded = load(path, prefix_cache=True)
    rng = np.random.default_rng(0)
    for kind in KINDS:
        answer(loaded, [1, 2, 3], kind, 4)
    settle()
    baseline, taken, blocks = loaded.device.memory(), device_bytes(), free_kv_blocks(loaded.engine)
    for job in range(JOBS):
        prompt = rng.integers(0, loaded.vocab_size, int(rng.integers(1, 400))).tolist()
        tokens = int(rng.integers(1, 100))
        sampling = replace(KINDS[job % len(KINDS)], seed=job)
        if job % 7 == 6:
            cancelled(loaded.engine, prompt, tokens, sampling)
        else:
            assert len(answer(loaded, prompt, sampling, tokens)) == tokens
        assert loaded.device.memory() == baseline, f"job {job}"
    settle()
    assert device_bytes() == taken
    assert free_kv_blocks(loaded.engine) == blocks
    assert loaded.device.non_resident() == (loaded.device.non_resident()[0], [])


@pytest.mark.parametrize("name", ["gpt-oss", "smollm2", "qwen2.5-0.5b"])
def test_a_thousand_jobs_at_64_sequences_leave_memory_at_its_baseline_to_the_byte(
    name, request, gpu, tiny, record_property
):
    sources = {"smollm2": lambda: request.getfixturevalue("smollm2_here"), "qwen2.5-0.5b": lambda: path_of(name)}
    loaded = load(sources.get(name, lambda: tiny(name))(), prefix_cache=True, max_running=RUNNING, kv_memory=0.05)
    engine, vocabulary = loaded.engine, loaded.tokenizer.vocab.size
    for rows in (1, 2, 4, 8, 16, 32, RUNNING):  # captures the graphs, and launches those of short chunks
        prompts = [[row] * (1 if row % 2 else 100) for row in range(rows)]
        run(engine, *(Sequence(f"{row}", ids, 48, KINDS[row % len(KINDS)]) for row, ids in enumerate(prompts)))
    settle()
    baseline, taken, blocks = loaded.device.memory(), device_bytes(), free_kv_blocks(engine)
    outcome = run_jobs(engine, random_jobs(MANY_JOBS, 11, vocabulary, prompt=100), random.Random(0), preempt=0.01)
    assert len(outcome.draws) == MANY_JOBS
    assert outcome.aborted
    assert outcome.cached
    assert outcome.preempted
    assert loaded.device.memory() == baseline
    settle()
    assert device_bytes() == taken
    assert free_kv_blocks(engine) == blocks
    assert engine.kv_blocks["used"] == 0
    assert loaded.device.non_resident() == (loaded.device.non_resident()[0], [])
    record_property(f"{name}: {MANY_JOBS} jobs at {RUNNING} sequences", f"{taken:,} bytes before and after")


def cancelled(engine, prompt, tokens, sampling):
    """A job that is stopped in the middle of its answer."""
    engine.add(Sequence("cancelled", prompt, tokens, sampling))
    for _ in range(3):
        engine.step()
    engine.abort("cancelled")
    assert engine.idle
