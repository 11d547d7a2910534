"""The next entry is claimed while the last events of a job are on their way to the server."""

from __future__ import annotations

import asyncio
import contextlib

from tests.jobs.harness import LossyStreams, assert_consistent, wait_until
from tests.service.models import ScriptedRunner, SharedModel
from tests.service.serving import LONG_LEASE, published_events, read_job, serving


class HeldAppend:
    """A connection whose `append` waits for `go`. A job of one token has one, its last."""

    def __init__(self, harness):
        self.called, self.go = asyncio.Event(), asyncio.Event()
        self.streams = LossyStreams(harness.connect(), lambda name: False, self._before)

    async def _before(self, name):
        if name == "append":
            self.called.set()
            await self.go.wait()


@contextlib.asynccontextmanager
async def next_job_claimed(harness):
    """Worker w1 has generated job `a` and claimed job `b`; the last events of `a` are held."""
    client, held, model = harness.client(), HeldAppend(harness), SharedModel.echo()
    runner = ScriptedRunner(model.runner, lambda step: None)
    async with serving(harness, model.fresh(runner), name="w1", streams=held.streams, lease=LONG_LEASE) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=1)
        await asyncio.wait_for(held.called.wait(), 10)
        await client.submit(job_id="b", prompt="abc", max_tokens=3)

        async def claimed():
            return [entry.worker for entry in await client.queue()] == ["w1", "w1"]

        await wait_until(claimed)
        assert runner.steps == 1, "the engine runs one job at a time"
        yield client, held, worker


async def test_the_next_entry_is_claimed_and_run_afterwards(harness):
    async with next_job_claimed(harness) as (client, held, _):
        assert (await published_events(harness, "b")).items == []
        held.go.set()
        assert (await read_job(client, "a")).text == "a"
        assert (await read_job(client, "b")).text == "abc"
    await assert_consistent(harness, a="a", b="abc")


async def test_a_drain_gives_the_next_entry_back_at_once(harness):
    async with next_job_claimed(harness) as (client, held, worker):
        worker.service.signal("test")
        held.go.set()
        assert await asyncio.wait_for(worker.task, 5) == 0
        assert [(entry.job_id, entry.deliveries) for entry in await client.queue()] == [("b", 0)]
    async with serving(harness, SharedModel.echo().fresh(), name="w2", lease=LONG_LEASE):
        assert (await read_job(client, "b")).text == "abc"


async def test_a_worker_that_dies_then_leaves_the_next_entry_to_others(fake):
    async with next_job_claimed(fake) as (client, _, worker):
        worker.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await worker.task
        await fake.connect().give_back("default", "w1", (await client.queue())[1].entry_id, 60_000, 1)
        async with serving(fake, SharedModel.echo().fresh(), name="w2", lease=LONG_LEASE):
            assert (await read_job(client, "b")).text == "abc"
