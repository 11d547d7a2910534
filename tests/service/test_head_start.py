"""An answer that is begun before the lease is there: it is faster, and otherwise nobody can tell."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.jobs.harness import LossyStreams, wait_until
from tests.jobs.stream_checker import assert_none, find_violations
from tests.service.serving import Gate, Model, Scripted, ask, published, serving, story
from tests.service.test_answers import undisturbed
from tests.service.test_continuing import FIELDS, first_worker
from tests.service.test_endings import failing, gone
from tests.service.test_prefix_cache import PROMPT, cached
from worker.config import LeaseSection
from worker.errors import CudaError, VramOom
from worker.jobs.keys import state_key

LONG = LeaseSection(lease_s=60, renew_s=0.1, scan_s=0.05)
"""Nobody gets a job by waiting for the end of a lease."""


class Held:
    """A connection whose `take` waits before it asks the server, until `go`."""

    def __init__(self, harness):
        self.asked, self.go = asyncio.Event(), asyncio.Event()
        self.streams = LossyStreams(harness.connect(), lambda name: False, self._before)

    async def _before(self, name):
        if name == "take":
            self.asked.set()
            await self.go.wait()

    async def until(self, true):
        """Wait for something while `take` is held."""
        await asyncio.wait_for(self.asked.wait(), 10)

        async def seen():
            return true()

        await wait_until(seen)


def watched(model=None, script=lambda step: None):
    model = model or Model.echo()
    runner = Scripted(model.runner, script)
    return runner, model.fresh(runner)


async def unread(worker, served):
    """Nothing of a job is left on the engine, and the watchdog counts on no steps of it."""

    async def free():
        idle = worker.engine.idle and not worker.service._engine.busy
        return idle and worker.engine.free_kv_blocks == served.engine.free_kv_blocks

    await wait_until(free)


async def test_the_engine_draws_while_take_is_on_its_way_and_nothing_is_published_before(harness):
    client, held = harness.client(), Held(harness)
    runner, served = watched()
    async with serving(harness, served, streams=held.streams, lease=LONG) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=5)
        await held.until(lambda: runner.steps == 5 and worker.engine.idle)
        assert (await published(harness, "a")).items == []
        held.go.set()
        told = await story(client, "a")
        assert told.kinds == ["started", "token", "end"]
        assert told.text == "abcab"
        await gone(client)
        assert_none(await find_violations(harness.connect(), "default", {"a": "abcab"}))


async def test_what_is_cached_is_counted_as_it_was_when_the_engine_began(fake, model):
    client = fake.client()
    fields = {"prompt_tokens": PROMPT, "seed": 7, "temperature": 0.8, "max_tokens": 12, "ignore_eos": True}
    async with serving(fake, model().fresh()):
        for known in (0, 96):
            told = await ask(client, **fields)
            assert cached(told) == known
            assert told.tokens == undisturbed(model(), **fields)


async def test_from_the_second_delivery_on_take_comes_first(fake):
    """Or a job that kills its worker would kill it before `take` counts the attempt."""
    client, held = fake.client(), Held(fake)
    runner, served = watched()
    await client.submit(job_id="a", prompt="abc", max_tokens=5)
    await first_worker(fake, Model.echo().fresh(), [])
    async with serving(fake, served, streams=held.streams, lease=LONG):
        await asyncio.wait_for(held.asked.wait(), 10)
        await asyncio.sleep(0.1)
        assert runner.steps == 0
        held.go.set()
        assert (await story(client, "a")).text == "abcab"


async def over(harness, client):
    assert await client.cancel("a") == "cancelled"


async def flagged(harness, client):
    await harness.raw.hset(state_key("a"), "cancel", "1")


async def anothers(harness, client):
    await harness.raw.hset(state_key("a"), mapping={"entry": "1-1", "worker": "another", "state": "running"})


@pytest.mark.parametrize(
    ("meanwhile", "left"),
    [(over, ["error"]), (flagged, ["error"]), (anothers, [])],
    ids=lambda x: getattr(x, "__name__", ""),
)
@pytest.mark.parametrize("whole", [True, False], ids=["drawn whole", "in prefill"])
async def test_a_job_that_is_not_ours_leaves_the_engine_as_it_was(fake, meanwhile, left, whole):
    client, held, gate = fake.client(), Held(fake), Gate(at=99 if whole else 1)
    runner, served = watched(script=gate.script)
    async with serving(fake, served, streams=held.streams, lease=LONG) as worker:
        await client.submit(job_id="a", prompt="x" * 200, max_tokens=5)
        await held.until(lambda: runner.steps == (8 if whole else 2))
        await meanwhile(fake, client)
        held.go.set()
        await gone(client)
        gate.open()
        await unread(worker, served)
        assert (await published(fake, "a")).kinds == left
        told = await ask(client, prompt="abc", max_tokens=3)
        assert (told.kinds, told.text) == (["started", "token", "end"], "abc")
        assert worker.service._meters.tokens_generated._value.get() == 3, "what was not published does not count"


async def test_a_take_that_the_server_refuses_leaves_the_engine_as_it_was(fake):
    client = fake.client()
    await fake.raw.set("inf:{job:a}:events", "no stream at all")
    runner, served = watched(script=lambda step: time.sleep(0.005))
    async with serving(fake, served) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=1000)

        async def failed():
            return bool(worker.logged("attempt_fault"))

        await wait_until(failed)
        await unread(worker, served)
        assert runner.steps < 1000


async def given_back(harness, served, tokens):
    """As after a drain: the next delivery counts as the first one, and the job has a history."""
    _, lease = await first_worker(harness, served, tokens)
    await harness.connect().give_back("default", "first", lease.claim.entry_id, 60_000, 0)


@pytest.mark.parametrize("cut", [0, 5, 12])
async def test_a_history_is_continued_with_its_replay_though_a_start_was_made(fake, model, cut):
    client, held = fake.client(), Held(fake)
    whole = undisturbed(model(), **FIELDS)
    await client.submit(job_id="a", **FIELDS)
    await given_back(fake, model().fresh(), whole[:cut])
    runner, served = watched(model())
    async with serving(fake, served, streams=held.streams, lease=LONG) as worker:
        await held.until(lambda: runner.steps > 0)
        held.go.set()
        told = await story(client, "a")
        assert told.tokens == whole
        assert [r.from_i for r in told.of("resumed")] == [cut]
        await unread(worker, served)
        assert_none(await find_violations(fake.connect(), "default", {"a": "".join(t.t for t in whole)}))


async def test_what_an_earlier_attempt_resolved_holds_though_it_published_no_token(fake):
    """This worker's longer context would leave more, and its start has drawn more already."""
    client, small, large, held = fake.client(), Model.echo(64), Model.echo(128), Held(fake)
    await client.submit(job_id="a", prompt="abc")
    await given_back(fake, small.fresh(), [])
    runner, served = watched(large)
    async with serving(fake, served, streams=held.streams, lease=LONG):
        await held.until(lambda: runner.steps > 100)
        held.go.set()
        told = await story(client, "a")
    assert told.of("started")[0].max_tokens == 61 == told.last.tokens_out == len(told.tokens)


async def test_a_device_lost_while_taking_ends_the_worker_and_another_continues_at_once(harness):
    client, held, served = harness.client(), Held(harness), failing(CudaError("an illegal address"), at=0, times=100)
    async with serving(harness, served, name="w1", streams=held.streams, lease=LONG) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=10)
        await held.until(lambda: served.engine._runner.steps == 1 and served.engine.idle)
        assert not worker.task.done()
        held.go.set()
        assert await asyncio.wait_for(worker.task, 10) == 2
    assert (await published(harness, "a")).kinds == ["started"]
    assert (await client.state("a"))["last_error"] == "CUDA_ERROR"
    async with serving(harness, Model.echo().fresh(), name="w2", lease=LONG):
        told = await story(client, "a", idle_s=5)
    assert told.kinds == ["started", "resumed", "token", "end"]
    assert told.text == "abcabcabca"


async def test_a_device_lost_over_a_job_that_is_not_ours_ends_the_worker_too(fake):
    client, held, served = fake.client(), Held(fake), failing(CudaError("an illegal address"), at=0, times=100)
    async with serving(fake, served, streams=held.streams, lease=LONG) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=10)
        await held.until(lambda: served.engine._runner.steps == 1 and served.engine.idle)
        await over(fake, client)
        held.go.set()
        assert await asyncio.wait_for(worker.task, 10) == 2
    await gone(client)
    assert (await published(fake, "a")).kinds == ["error"]


@pytest.mark.parametrize(
    ("error", "code"),
    [(VramOom("full"), "VRAM_OOM"), (MemoryError("no more"), "VRAM_OOM"), (KeyError("a bug"), "INTERNAL")],
)
async def test_a_start_that_fails_is_the_jobs_error_after_started(fake, error, code):
    client, held, served = fake.client(), Held(fake), failing(error, at=0)
    async with serving(fake, served, streams=held.streams, lease=LONG) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=10)
        await held.until(lambda: served.engine._runner.steps == 1 and served.engine.idle)
        assert (await published(fake, "a")).items == []
        held.go.set()
        told = await story(client, "a")
        assert (told.kinds, told.last.code) == (["started", "error"], code)
        await unread(worker, served)
        assert (await ask(client, prompt="abc", max_tokens=3)).text == "abc"


async def test_a_drain_that_comes_while_taking_hands_the_job_over(fake):
    client, held = fake.client(), Held(fake)
    _, served = watched(script=lambda step: time.sleep(0.01))
    async with serving(fake, served, name="w1", streams=held.streams, lease=LONG, grace_s=0.0) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=300)
        await asyncio.wait_for(held.asked.wait(), 10)
        worker.service.signal("test")
        attempt = worker.service._attempt
        await held.until(lambda: attempt.bounds.stop is not None)
        held.go.set()
        assert await asyncio.wait_for(worker.task, 5) == 0
        await unread(worker, served)
    async with serving(fake, Model.echo().fresh(), name="w2", lease=LONG):
        told = await story(client, "a")
    assert told.text == "abc" * 100
    assert [r.reason for r in told.of("resumed")] == ["drain"]


async def test_an_engine_that_hangs_while_taking_ends_the_worker_and_another_continues(fake):
    client, held, gate = fake.client(), Held(fake), Gate(at=0)
    _, served = watched(script=gate.script)
    async with serving(fake, served, name="w1", streams=held.streams, lease=LONG, stall_s=0.3) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=10)
        await asyncio.wait_for(held.asked.wait(), 10)
        attempt = worker.service._attempt
        await held.until(lambda: attempt.bounds.stop is not None)
        held.go.set()
        assert await asyncio.wait_for(worker.task, 10) == 2
        async with serving(fake, Model.echo().fresh(), name="w2", lease=LONG):
            assert (await story(client, "a", idle_s=5)).text == "abcabcabca"
        gate.open()
