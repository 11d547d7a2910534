"""Ids and log-probabilities of a job are the same bits alone and beside any others."""

from __future__ import annotations

import random
from functools import cache

import pytest

from tests.engine.random_jobs import draws_alone, random_jobs, run_jobs
from tests.models import cpu_runner, engine_of

COUNTS = {"qwen2": 200, "phi3": 24, "gpt-oss": 24, "llama3-rope": 24}
"""Jobs by model."""
KV_BLOCKS = {1: 200, 3: 10, 8: 14, 64: 200}
"""KV blocks by the number of sequences at once: where they are few, sequences are preempted."""
VOCABULARY = 280


@pytest.fixture(scope="module")
def expected(tiny):
    """Return a function from a model's name to its runner, its jobs and the draws of each alone."""

    @cache
    def of(name):
        runner = cpu_runner(tiny(name), kv_blocks=200, slots=64)
        jobs = random_jobs(COUNTS[name], 5, VOCABULARY)
        return runner, jobs, {job.name: draws_alone(lambda: engine_of(runner, prefix_cache=False), job) for job in jobs}

    return of


@pytest.mark.parametrize("running", KV_BLOCKS)
@pytest.mark.parametrize("name", COUNTS)
def test_a_job_draws_the_same_bits_alone_and_beside_others(name, running, expected):
    runner, jobs, alone = expected(name)
    chance, blocks = random.Random(running), KV_BLOCKS[running]
    chunk = 1024 if running == 64 else chance.choice([16, 64, 256])
    order = chance.sample(range(blocks), blocks)
    engine = engine_of(runner, running=running, chunk=chunk, beside=chunk, order=order)
    drawn = run_jobs(engine, chance.sample(jobs, len(jobs)), chance)
    for job in jobs:
        assert drawn[job.name] == alone[job.name], job
    assert engine.kv_blocks["used"] == 0
    assert (name, running) != ("qwen2", 3) or engine.sequences[2] > 0, "no sequence was preempted"


@pytest.mark.parametrize("after", range(13))
def test_a_sequence_that_is_preempted_after_any_token_draws_the_same_bits(after, expected):
    runner, jobs, alone = expected("qwen2")
    job = max((job for job in jobs if job.abort_after is None), key=lambda job: len(alone[job.name]))
    engine, drawn = engine_of(runner, running=2, chunk=16), []
    sequence = job.sequence()
    engine.add(sequence)
    while not engine.idle:
        drawn += [token.draw for token in engine.step()]
        if len(drawn) == after and not sequence.preempted:
            runner.stop(sequence.slot)
            engine._scheduler._requeue(sequence)
            after = -1
    assert drawn == alone[job.name]
    assert len(drawn) > 13


def test_the_jobs_differ_in_what_they_request():
    jobs = random_jobs(200, 5, VOCABULARY)
    assert sum(job.abort_after is not None for job in jobs) > 10
    assert sum(job.sampling.logprobs is not None for job in jobs) > 30
    assert sum(job.sampling.repetition_penalty != 1 for job in jobs) > 30
    assert sum(bool(job.sampling.stop_token_ids) for job in jobs) > 30
