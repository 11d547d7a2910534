"""Ids and log-probabilities of a job are the same bits alone and beside any others."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from tests.engine.random_jobs import (
    FULL_SIZE_TYPES,
    assert_same_draws,
    draws_alone,
    long_answers,
    random_jobs,
    run_beside,
    run_jobs,
)
from tests.models import cpu_runner, engine_of
from tests.tiny_models import make_tiny
from worker.model import DraftSupport

NAMES = ("qwen2", "phi3", "gpt-oss", "llama3-rope", "qwen3moe")
JOBS, JOBS_OF_A_TYPE, VOCABULARY = 200, 30, 280
KV_BLOCKS = {1: 200, 3: 24, 8: 40, 64: 200}
"""KV blocks by the number of sequences at once: few, so that cached ones are evicted."""
SCARCE_BLOCKS = {8: 27, 64: 40}
"""Fewer than long answers need: the engine preempts."""
FREE_DRAFTS = DraftSupport(0, dict.fromkeys((1, 2, 4, 8), 1.0), 0.0)
"""Draft tokens that cost nothing are always verified."""


@pytest.fixture(scope="module")
def expected(tiny):
    """Return a function from a model's name to its runner, its jobs and the draws of each alone."""

    @cache
    def of(name):
        runner = cpu_runner(tiny(name), kv_blocks=200, slots=64)
        jobs = random_jobs(JOBS, 5, VOCABULARY)
        return runner, jobs, draws_alone(runner, jobs)

    return of


@pytest.mark.parametrize("running", KV_BLOCKS)
@pytest.mark.parametrize("name", NAMES)
def test_a_job_draws_the_same_bits_alone_and_beside_others(name, running, expected):
    runner, jobs, alone = expected(name)
    assert_same_draws(run_beside(runner, jobs, running, KV_BLOCKS[running]), alone, jobs)


@pytest.mark.parametrize("running", [1, 3, 8])
@pytest.mark.parametrize("name", NAMES)
def test_a_job_draws_the_same_bits_with_and_without_prompt_lookup(name, running, expected, monkeypatch):
    runner, jobs, _ = expected(name)
    repeating = [replace(job, prompt=job.prompt[:7] * 6, max_tokens=job.max_tokens + 10) for job in jobs[:60]]
    alone = draws_alone(runner, repeating)
    monkeypatch.setattr(runner, "drafts", FREE_DRAFTS)
    outcome = run_beside(runner, repeating, running, KV_BLOCKS[running], speculation="ngram")
    assert outcome.draws == alone
    proposed, accepted = outcome.engine.draft_tokens
    assert name != "qwen2" or 0 < accepted < proposed


@pytest.mark.parametrize("kind", FULL_SIZE_TYPES)
def test_a_job_draws_the_same_bits_with_every_type_of_the_full_size_files(kind, tmp_path):
    path = make_tiny("llama3-rope", tmp_path / "one_type.gguf", quant=kind)
    runner, jobs = cpu_runner(path, kv_blocks=200, slots=64), random_jobs(JOBS_OF_A_TYPE, 6, VOCABULARY)
    alone = draws_alone(runner, jobs)
    for running in (3, 64):
        assert run_beside(runner, jobs, running, KV_BLOCKS[running], preempt=0.05).draws == alone


@pytest.mark.parametrize(("running", "blocks"), SCARCE_BLOCKS.items())
def test_a_job_draws_the_same_bits_if_sequences_are_preempted_for_want_of_kv_blocks(running, blocks, expected):
    runner, jobs = expected("qwen2")[0], long_answers()
    alone = draws_alone(runner, jobs)
    outcome = run_beside(runner, jobs, running, blocks, preempt=0)
    assert outcome.draws == alone
    assert outcome.preempted


def test_a_thousand_jobs_at_64_sequences_leave_no_kv_block_and_no_slot_in_use(tiny):
    running, blocks = 64, 300
    runner = cpu_runner(tiny("llama3-rope"), kv_blocks=blocks, slots=running)
    engine = engine_of(runner, running=running, chunk=512, beside=512)
    jobs = random_jobs(1000, 11, VOCABULARY, tokens=4)
    outcome = run_jobs(engine, jobs, random.Random(0), preempt=0.01)
    assert len(outcome.draws) == len(jobs)
    assert min(len(outcome.aborted), outcome.cached, outcome.preempted) > 10
    scheduler, pool = engine._scheduler, engine._blocks
    assert scheduler.slots == [None] * running
    assert sorted(scheduler._free_slots) == list(range(running))
    assert not any((scheduler._running, scheduler._prefilling, scheduler._paused, scheduler.short, engine.active))
    assert not runner._generating
    assert not pool._readers.any()
    assert engine.kv_blocks["used"] == 0
    cached = [*pool._cached]
    pool.clear_cache()
    assert engine.kv_blocks == {"used": 0, "cached": 0, "free": blocks}
    assert len(cached) == len(set(cached))
    taken = pool.extend(np.empty(0, np.int32), blocks)
    assert sorted(taken) == list(range(blocks)), "a block was lost or is free twice"


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
    assert sum(job.sampling.grammar is not None for job in jobs) > 30
