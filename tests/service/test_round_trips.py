"""Calls to the server per job, and which of them the next job waits for."""

from __future__ import annotations

import asyncio
from collections import Counter

from tests.jobs.harness import LossyStreams, wait_until
from tests.service.models import SharedModel
from tests.service.serving import read_job, run_job, serving, wait_until_queue_is_empty


async def test_a_job_makes_one_call_of_each_kind(harness):
    counts = Counter()

    async def count(name):
        counts[name] += 1

    async def settled():
        return counts["expire_job"] == 10

    client = harness.client()
    async with serving(harness, SharedModel.echo().fresh(), streams=LossyStreams(harness.connect(), _never, count)):
        for _ in range(10):
            await run_job(client, prompt="abc", max_tokens=1)
        await wait_until(settled)
        assert counts["take"] == counts["settle"] == 10
        assert 10 <= counts["append"] <= 20, "the first token may be published before the end"


def _never(name):
    return False


async def test_the_next_job_does_not_wait_for_the_acknowledgement(harness):
    released = asyncio.Event()

    async def hold(name):
        if name == "settle":
            await released.wait()

    client = harness.client()
    async with serving(harness, SharedModel.echo().fresh(), streams=LossyStreams(harness.connect(), _never, hold)):
        await client.submit(job_id="a", prompt="abc", max_tokens=3)
        await client.submit(job_id="b", prompt="abc", max_tokens=6)
        assert (await read_job(client, "b")).text == "abcabc"
        assert len(await client.queue()) == 2
        released.set()
        await wait_until_queue_is_empty(client)


async def test_a_stopping_worker_settles_its_last_job(harness):
    async def slow(name):
        if name == "settle":
            await asyncio.sleep(0.3)

    client = harness.client()
    async with serving(
        harness, SharedModel.echo().fresh(), streams=LossyStreams(harness.connect(), _never, slow)
    ) as worker:
        await run_job(client, prompt="abc", max_tokens=3)
        assert await worker.stop() == 0
    assert await client.queue() == []
