"""The server loses the delivery of running jobs, and the same worker receives their entries again."""

from __future__ import annotations

import pytest

from tests.jobs.harness import Harness, assert_consistent, wait_until
from tests.service.serving import LONG_LEASE, published_events, read_job, serving, wait_until_queue_is_empty
from worker.echo import load_echo
from worker.jobs.keys import events_key, queue_key, state_key

JOBS = ("a", "b")
ANSWER = {job_id: job_id * 40 for job_id in JOBS}


@pytest.mark.parametrize("entries", [1, 2])
async def test_jobs_begin_again_without_a_second_attempt_beside_the_first(harness: Harness, entries: int) -> None:
    """With two entries of a job, a second attempt begins in the same worker and epoch."""
    client = harness.client()
    for job_id in JOBS * entries:
        await client.submit(job_id=job_id, prompt=job_id, max_tokens=40)
    job_keys = [key(job_id) for job_id in JOBS for key in (events_key, state_key)]
    lose_delivery = await harness.snapshot(queue_key("default"), *job_keys)
    model = load_echo(512, 512, 0.02, lambda done, total: None, max_running=6)
    async with serving(harness, model, lease=LONG_LEASE) as worker:

        async def begun() -> bool:
            return all([len((await published_events(harness, job_id)).tokens) > 5 for job_id in JOBS])

        await wait_until(begun)
        await lose_delivery()
        for job_id in JOBS:
            assert (await read_job(client, job_id)).text == ANSWER[job_id]
        await wait_until_queue_is_empty(client)
        outcomes = {line["outcome"] for line in worker.logged("job_released")}
        assert outcomes & {"fenced", "lost"}
        assert [line["job_id"] for line in worker.logged("job_completed")].count("a") == 1
    assert not [event for event in ("job_fault", "attempt_fault", "loop_fault") if worker.logged(event)]
    await assert_consistent(harness, **ANSWER)
