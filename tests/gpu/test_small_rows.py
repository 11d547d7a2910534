"""Steps of 8 and of 32 rows of tiny models: the smallest runs of all kernels of several rows.

For the sanitizers, which slow kernels down a hundred times. `test_random_jobs.py` runs more jobs.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.engine.random_jobs import BATCHED_MODELS, draws_alone, random_jobs, run_jobs
from tests.gpu.guarded import POISON
from tests.gpu.loaded import gpu_runner
from tests.models import engine_of

KV_BLOCKS, CONTEXT = 80, 64


@pytest.fixture
def poisoned(gpu, memory, monkeypatch):
    """Device memory that holds NaNs until it is written: a row that reads too much shows it."""
    reserve = memory.reserve

    def filled(nbytes, purpose):
        slab = reserve(nbytes, purpose)
        slab.array((slab.nbytes,), np.uint8).fill(POISON)
        gpu.cuda.runtime.deviceSynchronize()  # uploads are on streams that do not wait for this one
        return slab

    monkeypatch.setattr(memory, "reserve", filled)
    return memory


@pytest.mark.parametrize("name", BATCHED_MODELS)
def test_steps_of_8_and_32_rows_draw_what_each_row_draws_alone(name, tiny, kernels, poisoned):
    sizes = {"context": CONTEXT, "prefill_tokens": 32, "logit_rows": 1}
    many = gpu_runner(tiny(name), kernels, poisoned, kv_blocks=KV_BLOCKS, slots=32, **sizes)
    one = gpu_runner(tiny(name), kernels, poisoned, **sizes)
    jobs = random_jobs(32, 3, 280, prompt=8, tokens=4)
    alone = draws_alone(one, jobs[:3], CONTEXT)
    for rows in (8, 32):
        outcome = run_jobs(engine_of(many, context=CONTEXT, chunk=32, running=rows), jobs[:rows])
        assert all(outcome.draws.values())
        assert {job.name: outcome.draws[job.name] for job in jobs[:3]} == alone
