"""On the GPU, ids and log-probabilities of a job are the same bits alone and beside any others."""

from __future__ import annotations

import time

import pytest

from tests.engine.random_jobs import (
    BATCHED_MODELS,
    FULL_SIZE_TYPES,
    assert_same_draws,
    draws_alone,
    long_answers,
    random_jobs,
    run_beside,
)
from tests.gpu.full import MODELS, path_of
from tests.gpu.loaded import gpu_runner
from tests.gpu.served import load, settle
from tests.tiny_models import make_tiny

JOBS, JOBS_OF_A_TYPE, VOCABULARY = 200, 60, 280
KV_BLOCKS = {1: 200, 3: 24, 8: 40, 64: 200}
"""KV blocks by the number of sequences at once: few, so that cached ones are evicted."""
SCARCE_BLOCKS = {8: 27, 64: 40}
"""Fewer than long answers need: the engine preempts."""
FULL_KV_BLOCKS = {1: 64, 3: 32, 8: 64, 64: 1024}
FULL_CONTEXT = 512
FULL_PROMPT = 300
"""Tokens of the longest prompt: attention has up to two splits."""


def both(path, kernels, memory):
    """Runners of one slot and of as many as run at once."""
    sizes = {"kv_blocks": max(KV_BLOCKS.values()), "slots": max(KV_BLOCKS)}
    return gpu_runner(path, kernels, memory), gpu_runner(path, kernels, memory, **sizes)


@pytest.mark.parametrize("name", BATCHED_MODELS)
def test_a_job_draws_the_same_bits_alone_and_beside_others(name, tiny, kernels, memory):
    (one, many), jobs = both(tiny(name), kernels, memory), random_jobs(JOBS, 5, VOCABULARY)
    alone = draws_alone(one, jobs)
    for running, blocks in KV_BLOCKS.items():
        assert_same_draws(run_beside(many, jobs, running, blocks), alone, jobs)
    jobs = long_answers()
    alone = draws_alone(one, jobs)
    for running, blocks in SCARCE_BLOCKS.items():
        outcome = run_beside(many, jobs, running, blocks, preempt=0)
        assert outcome.draws == alone
        assert outcome.preempted


@pytest.mark.parametrize("kind", FULL_SIZE_TYPES)
def test_a_job_draws_the_same_bits_with_every_type_of_the_full_size_files(kind, tmp_path, kernels, memory):
    one, many = both(make_tiny("llama3-rope", tmp_path / "one_type.gguf", quant=kind), kernels, memory)
    jobs = random_jobs(JOBS_OF_A_TYPE, 6, VOCABULARY)
    alone = draws_alone(one, jobs)
    for running in (3, 8, 64):
        assert run_beside(many, jobs, running, KV_BLOCKS[running], preempt=0.05).draws == alone


@pytest.mark.parametrize("model", MODELS)
def test_a_job_of_a_full_size_model_draws_the_same_bits_alone_and_beside_others(model, gpu, record_property):
    path, began = path_of(model), time.perf_counter()
    loaded = load(path, context=FULL_CONTEXT)
    jobs = random_jobs(JOBS, 7, loaded.tokenizer.vocab.size, prompt=FULL_PROMPT)
    alone = draws_alone(loaded.engine._runner, jobs)
    del loaded
    settle()
    many = load(path, context=FULL_CONTEXT, max_running=max(FULL_KV_BLOCKS), kv_memory=0.25).engine._runner
    for running, blocks in FULL_KV_BLOCKS.items():
        outcome = run_beside(many, jobs, running, blocks, chunks=(128, 256))
        assert_same_draws(outcome, alone, jobs)
    seconds = time.perf_counter() - began
    tokens = sum(map(len, alone.values()))
    record_property(f"{model}: random jobs", f"{tokens:,} tokens the same at {[*FULL_KV_BLOCKS]}, {seconds:.0f} s")
    del many
    settle()
