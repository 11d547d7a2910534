"""A job that was cancelled, doubled or late while it waited is ended without a step of the engine."""

from __future__ import annotations

import asyncio
import time

from tests.jobs.harness import assert_consistent
from tests.service.models import ScriptedRunner, SharedModel, slow_model
from tests.service.serving import published_events, read_job, serving, wait_until_queue_is_empty

STEPS = 3
"""Of a job with a prompt of one chunk and three tokens: prefill and two of decode."""


def counted(script=lambda step: None):
    model = SharedModel.echo()
    runner = ScriptedRunner(model.runner, script)
    return runner, model.fresh(runner)


async def test_cancelled_doubled_and_late_jobs_that_waited_cost_no_step(harness):
    client = harness.client()
    cancelled = [await client.submit(prompt="abc", max_tokens=3) for _ in range(20)]
    for job in cancelled:
        assert await client.cancel(job) == "cancelled"
    for _ in range(20):
        await client.submit(job_id="doubled", prompt="abc", max_tokens=3)
    late = [await client.submit(prompt="abc", max_tokens=3, deadline_ms=1) for _ in range(20)]
    last = await client.submit(prompt="abc", max_tokens=3)
    await asyncio.sleep(0.1)
    runner, loaded = counted()
    async with serving(harness, loaded):
        assert (await read_job(client, last)).text == "abc"
        await wait_until_queue_is_empty(client)
        assert runner.steps == 2 * STEPS, "the doubled job and the last one"
    for job in cancelled:
        assert [event.code for event in (await published_events(harness, job)).of("error")] == ["CANCELLED"]
    for job in late:
        assert (await published_events(harness, job)).last.code == "INFERENCE_TIMEOUT"
    assert (await published_events(harness, "doubled")).text == "abc"
    await assert_consistent(harness, doubled="abc")


async def test_a_job_behind_a_hundred_cancelled_ones_does_not_wait_for_them(harness):
    client = harness.client()
    async with serving(harness, slow_model(0.1)):
        first = await client.submit(prompt="abc", max_tokens=10)
        cancelled = [await client.submit(prompt="abc", max_tokens=3) for _ in range(100)]
        for job in cancelled:
            assert await client.cancel(job) == "cancelled"
        last = await client.submit(prompt="abc", max_tokens=1)
        assert (await read_job(client, first)).kinds[-1] == "end"
        began = time.monotonic()
        assert (await read_job(client, last)).text == "a"
        assert time.monotonic() - began < 5, "100 prefill steps take 10 s"
