"""Many jobs in one worker: their tokens are published together, each job exactly once."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from tests.jobs.harness import LossyStreams, assert_consistent, wait_until
from tests.service.serving import LONG_LEASE, read_job, serving
from worker.config import ServiceSection
from worker.echo import load_echo
from worker.service.flush_loop import FlushLoop

JOBS = 12


def many_at_once(step_s=0.02):
    return load_echo(512, 512, step_s, lambda done, total: None, max_running=JOBS)


async def run_all(client, tokens=60):
    for n in range(JOBS):
        await client.submit(job_id=f"j{n}", prompt=f"job {n:02}", max_tokens=tokens)
    return await asyncio.gather(*(read_job(client, f"j{n}") for n in range(JOBS)))


def expected(n, tokens=60):
    return (f"job {n:02}" * tokens)[:tokens]


async def test_jobs_that_run_together_share_calls(harness):
    counts = Counter()

    async def count(name):
        counts[name] += 1

    streams = LossyStreams(harness.connect(), lambda name: False, count)
    async with serving(harness, many_at_once(), streams=streams, lease=LONG_LEASE):
        results = await run_all(harness.client())
    assert [result.text for result in results] == [expected(n) for n in range(JOBS)]
    assert counts["append_many"] >= 1
    await assert_consistent(harness, **{f"j{n}": expected(n) for n in range(JOBS)})


@pytest.mark.parametrize("every", [1, 2, 5])
async def test_lost_replies_of_shared_calls_lose_and_repeat_nothing(harness, every):
    calls = Counter()

    def lose(name):
        calls[name] += 1
        return name == "append_many" and calls[name] % every == 0

    streams = LossyStreams(harness.connect(), lose)
    async with serving(harness, many_at_once(), streams=streams, lease=LONG_LEASE):
        results = await run_all(harness.client())
    assert [result.text for result in results] == [expected(n) for n in range(JOBS)]
    await assert_consistent(harness, **{f"j{n}": expected(n) for n in range(JOBS)})


async def test_a_cancel_ends_one_of_many_jobs(fake):
    client = fake.client()
    async with serving(fake, many_at_once(0.01), lease=LONG_LEASE):
        running = asyncio.create_task(run_all(client, tokens=150))

        async def started():
            return (await client.state("j3")).get("state") == "running"

        await wait_until(started)
        await client.cancel("j3")
        results = await asyncio.wait_for(running, 30)
    assert [result.last.kind for result in results] == ["error" if n == 3 else "end" for n in range(JOBS)]
    assert all(result.text == expected(n, 150) for n, result in enumerate(results) if n != 3)


class Source:
    """A token source that records what is done with it."""

    def __init__(self, *, idle=True, stages=True):
        self.lease, self.idle, self.stages, self.calls = object(), idle, stages, []

    def stage(self):
        self.calls.append("stage")
        asyncio.get_running_loop().call_soon(self.calls.append, "later")
        return self.stages

    def request_append(self):
        self.calls.append("append")


class Sink:
    """A transport that notes the calls made of the sources before each of its own."""

    def __init__(self, written, *sources, wait=None):
        self.written, self.leases, self.before = written, [], []
        self._sources, self._wait = sources, wait

    async def append_staged(self, leases):
        self.leases.append(leases)
        self.before.append([source.calls.copy() for source in self._sources])
        if self._wait is not None:
            await self._wait.wait()
        if self.written is None:
            raise OSError("a bug")
        return self.written


async def flush(sink, *sources, at_once=False):
    loop = FlushLoop(sink, ServiceSection().flush_ms)
    for source in sources:
        loop.add(source, at_once=at_once)
    await asyncio.sleep(0.005 if at_once else 0.1)


async def test_a_single_due_job_publishes_in_its_own_task():
    sink, alone = Sink([]), Source()
    await flush(sink, alone)
    assert (alone.calls, sink.leases) == (["append"], [])


async def test_a_job_with_an_append_in_flight_is_not_in_the_batch():
    sink, busy, sources = Sink([True, True]), Source(idle=False), [Source(), Source()]
    await flush(sink, *sources, busy, at_once=True)
    assert busy.calls == ["append"]
    assert [source.calls for source in sources] == [["stage", "later"], ["stage", "later"]]
    assert sink.leases == [[source.lease for source in sources]]


async def test_nothing_runs_between_staging_and_the_call():
    """A job's own task could write the staged events and the last one before the call."""
    sources = [Source(), Source()]
    sink = Sink([True, True], *sources)
    await flush(sink, *sources)
    assert sink.before == [[["stage"], ["stage"]]]


@pytest.mark.parametrize("written", [[True, False], None])
async def test_jobs_whose_events_were_not_written_repeat_them(written):
    sources = [Source(), Source(), Source(stages=False)]
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda *_: None)  # of the task that raised
    await flush(Sink(written), *sources)
    repeated = [source.calls.count("append") for source in sources]
    assert repeated == ([0, 1, 0] if written else [1, 1, 0])


async def test_one_call_is_in_flight_and_the_next_has_what_became_due_meanwhile():
    answered, sources = asyncio.Event(), [Source(), Source(), Source(), Source()]
    sink = Sink([True, True], wait=answered)
    loop = FlushLoop(sink, 10)
    for source in sources[:2]:
        loop.add(source)
    await asyncio.sleep(0.05)
    for source in sources[2:]:
        loop.add(source, at_once=True)
    await asyncio.sleep(0.05)
    assert sink.leases == [[source.lease for source in sources[:2]]]
    answered.set()
    await asyncio.sleep(0.005)
    assert sink.leases[1:] == [[source.lease for source in sources[2:]]]


async def test_a_flush_after_a_call_cancels_the_timer():
    """Otherwise every late flush would add a timer, and the flushes would become more frequent."""
    answered, sources = asyncio.Event(), [Source(), Source()]
    sink = Sink([True, True], wait=answered)
    loop = FlushLoop(sink, 100)

    async def add(*, at_once, wait_s):
        for source in sources:
            loop.add(source, at_once=at_once)
        await asyncio.sleep(wait_s)

    await add(at_once=True, wait_s=0.005)  # in flight
    await add(at_once=True, wait_s=0.005)  # late
    await add(at_once=False, wait_s=0.06)  # a timer of 100 ms
    answered.set()
    await asyncio.sleep(0.005)
    assert len(sink.leases) == 2
    await add(at_once=False, wait_s=0.06)  # the first timer would have fired by now
    assert len(sink.leases) == 2
    await asyncio.sleep(0.1)
    assert len(sink.leases) == 3


async def test_a_source_that_fails_leaves_the_others_to_their_own_tasks():
    class Faulty(Source):
        def stage(self):
            raise ZeroDivisionError

    sources = [Source(), Faulty(), Source()]
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # of the task that raised
    await flush(Sink([]), *sources)
    assert [source.calls.count("append") for source in sources] == [1, 1, 1]


async def test_a_job_that_was_discarded_is_not_flushed():
    sink, sources = Sink([True]), [Source(), Source()]
    loop = FlushLoop(sink, 10)
    for source in sources:
        loop.add(source)
    loop.discard(sources[0])
    await asyncio.sleep(0.1)
    assert [source.calls for source in sources] == [[], ["append"]]
