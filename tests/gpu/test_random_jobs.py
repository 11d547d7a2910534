"""On the GPU, ids and log-probabilities of a job are the same bits alone and beside any others."""

from __future__ import annotations

import random

import pytest

from tests.engine.random_jobs import draws_alone, random_jobs, run_jobs
from tests.gpu.loaded import gpu_runner
from tests.models import engine_of

NAMES = ("qwen2", "phi3", "gpt-oss", "llama3-rope")
JOBS, VOCABULARY = 200, 280
KV_BLOCKS = {1: 200, 3: 10, 8: 14, 64: 200}
"""KV blocks by the number of sequences at once: where they are few, sequences are preempted."""


@pytest.mark.parametrize("name", NAMES)
def test_a_job_draws_the_same_bits_alone_and_beside_others(name, tiny, kernels, memory):
    one = gpu_runner(tiny(name), kernels, memory)
    many = gpu_runner(tiny(name), kernels, memory, kv_blocks=max(KV_BLOCKS.values()), slots=max(KV_BLOCKS))
    jobs = random_jobs(JOBS, 5, VOCABULARY)
    alone = {job.name: draws_alone(lambda: engine_of(one, prefix_cache=False), job) for job in jobs}
    for running, blocks in KV_BLOCKS.items():
        chance = random.Random(running)
        chunk = 512 if running == 64 else chance.choice([16, 64, 256])
        order = chance.sample(range(blocks), blocks)
        engine = engine_of(many, running=running, chunk=chunk, beside=chunk, order=order)
        drawn = run_jobs(engine, chance.sample(jobs, len(jobs)), chance)
        for job in jobs:
            assert drawn[job.name] == alone[job.name], (running, job)
