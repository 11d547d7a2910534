"""Starting an answer before the lease is granted changes its latency and nothing else."""

from __future__ import annotations

import asyncio
import math
import time

import pytest

from tests.jobs.harness import wait_until
from tests.jobs.stream_checker import assert_none, find_violations
from tests.models import free_kv_blocks
from tests.service.jobs import PROMPT_TOKENS, SAMPLED_JOB, crashed_attempt, handed_back_attempt, reference_tokens
from tests.service.models import ScriptedRunner, SharedModel, StepBarrier, failing_model
from tests.service.serving import (
    LONG_LEASE,
    HeldTake,
    published_events,
    read_job,
    run_job,
    serving,
    wait_until_queue_is_empty,
)
from worker.errors import CudaError, VramOom
from worker.jobs.keys import state_key
from worker.service import attempt


def scripted(model=None, script=lambda step: None):
    model = model or SharedModel.echo()
    runner = ScriptedRunner(model.runner, script)
    return runner, model.fresh(runner)


async def wait_until_engine_is_free(worker, loaded):
    """Wait until no job is left on the engine and the watchdog expects no steps of it."""

    async def free():
        idle = worker.engine.idle and not worker.service._engine.busy
        return idle and free_kv_blocks(worker.engine) == free_kv_blocks(loaded.engine)

    await wait_until(free)


async def test_the_engine_draws_during_take_and_nothing_is_published_before(harness):
    client, held = harness.client(), HeldTake(harness)
    runner, loaded = scripted()
    async with serving(harness, loaded, streams=held.streams, lease=LONG_LEASE) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=5)
        await held.wait_until(lambda: runner.steps == 5 and worker.engine.idle)
        assert (await published_events(harness, "a")).items == []
        held.go.set()
        result = await read_job(client, "a")
        assert result.kinds == ["started", "token", "end"]
        assert result.text == "abcab"
        await wait_until_queue_is_empty(client)
        assert_none(await find_violations(harness.connect(), "default", {"a": "abcab"}))


async def test_cached_tokens_are_counted_when_the_engine_starts(fake, model):
    client = fake.client()
    fields = {"prompt_tokens": PROMPT_TOKENS, "seed": 7, "temperature": 0.8, "max_tokens": 12, "ignore_eos": True}
    async with serving(fake, model().fresh()):
        for cached in (0, 96):
            result = await run_job(client, **fields)
            assert result.cached_tokens == cached
            assert result.tokens == reference_tokens(model(), **fields)


@pytest.fixture
def at_once(monkeypatch):
    """Every entry counts as delivered at once, however long it waited."""
    monkeypatch.setattr(attempt, "_WAITED_MS", math.inf)


async def test_after_a_wait_take_precedes_the_engine(fake):
    """Otherwise a step would be run for jobs that were cancelled meanwhile."""
    client, held = fake.client(), HeldTake(fake)
    runner, loaded = scripted()
    await client.submit(job_id="a", prompt="abc", max_tokens=5)
    await asyncio.sleep(2 * attempt._WAITED_MS / 1000)
    async with serving(fake, loaded, streams=held.streams, lease=LONG_LEASE):
        await asyncio.wait_for(held.called.wait(), 10)
        await asyncio.sleep(0.1)
        assert runner.steps == 0
        held.go.set()
        assert (await read_job(client, "a")).text == "abcab"


async def test_from_the_second_delivery_on_take_precedes_the_engine(fake):
    """Otherwise a job that kills its worker would kill it before `take` counts the attempt."""
    client, held = fake.client(), HeldTake(fake)
    runner, loaded = scripted()
    await client.submit(job_id="a", prompt="abc", max_tokens=5)
    await crashed_attempt(fake, SharedModel.echo().fresh(), [])
    async with serving(fake, loaded, streams=held.streams, lease=LONG_LEASE):
        await asyncio.wait_for(held.called.wait(), 10)
        await asyncio.sleep(0.1)
        assert runner.steps == 0
        held.go.set()
        assert (await read_job(client, "a")).text == "abcab"


async def cancelled(harness, client):
    assert await client.cancel("a") == "cancelled"


async def flagged(harness, client):
    await harness.raw.hset(state_key("a"), "cancel", "1")


async def taken_by_another(harness, client):
    await harness.raw.hset(state_key("a"), mapping={"entry": "1-1", "worker": "another", "state": "running"})


@pytest.mark.parametrize(
    ("meanwhile", "left"),
    [(cancelled, ["error"]), (flagged, ["error"]), (taken_by_another, [])],
    ids=lambda x: getattr(x, "__name__", ""),
)
@pytest.mark.parametrize("complete", [True, False], ids=["complete", "in prefill"])
async def test_a_job_without_a_lease_leaves_the_engine_as_it_was(fake, meanwhile, left, complete):
    client, held, barrier = fake.client(), HeldTake(fake), StepBarrier(at=99 if complete else 1)
    runner, loaded = scripted(script=barrier.script)
    async with serving(fake, loaded, streams=held.streams, lease=LONG_LEASE) as worker:
        await client.submit(job_id="a", prompt="x" * 200, max_tokens=5)
        await held.wait_until(lambda: runner.steps == (8 if complete else 2))
        await meanwhile(fake, client)
        held.go.set()
        await wait_until_queue_is_empty(client)
        barrier.release()
        await wait_until_engine_is_free(worker, loaded)
        assert (await published_events(fake, "a")).kinds == left
        result = await run_job(client, prompt="abc", max_tokens=3)
        assert (result.kinds, result.text) == (["started", "token", "end"], "abc")
        assert worker.service._metrics.tokens_generated._value.get() == 3, "unpublished tokens do not count"


async def test_a_take_that_the_server_refuses_leaves_the_engine_as_it_was(fake):
    client = fake.client()
    await fake.raw.set("inf:{job:a}:events", "no stream at all")
    runner, loaded = scripted(script=lambda step: time.sleep(0.005))
    async with serving(fake, loaded) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=1000)
        await worker.wait_until_logged("job_failed")
        await wait_until_engine_is_free(worker, loaded)
        assert runner.steps < 1000


@pytest.mark.parametrize("cut", [0, 5, 12])
async def test_a_job_with_a_history_is_replayed_although_it_was_started(fake, model, cut, at_once):
    client, held = fake.client(), HeldTake(fake)
    whole = reference_tokens(model(), **SAMPLED_JOB)
    await client.submit(job_id="a", **SAMPLED_JOB)
    await handed_back_attempt(fake, model().fresh(), whole[:cut])
    runner, loaded = scripted(model())
    async with serving(fake, loaded, streams=held.streams, lease=LONG_LEASE) as worker:
        await held.wait_until(lambda: runner.steps > 0)
        held.go.set()
        result = await read_job(client, "a")
        assert result.tokens == whole
        assert [r.from_i for r in result.of("resumed")] == [cut]
        await wait_until_engine_is_free(worker, loaded)
        assert_none(await find_violations(fake.connect(), "default", {"a": "".join(t.t for t in whole)}))


async def test_the_parameters_of_an_earlier_attempt_hold_although_it_published_no_token(fake, at_once):
    """This worker's longer context would leave more tokens, and it has already drawn more."""
    client, small, large, held = fake.client(), SharedModel.echo(64), SharedModel.echo(128), HeldTake(fake)
    await client.submit(job_id="a", prompt="abc")
    await handed_back_attempt(fake, small.fresh(), [])
    runner, loaded = scripted(large)
    async with serving(fake, loaded, streams=held.streams, lease=LONG_LEASE):
        await held.wait_until(lambda: runner.steps > 100)
        held.go.set()
        result = await read_job(client, "a")
    assert result.of("started")[0].max_tokens == 61 == result.last.tokens_out == len(result.tokens)


async def test_a_device_lost_during_take_ends_the_worker_and_another_continues_at_once(harness):
    client, held, loaded = (
        harness.client(),
        HeldTake(harness),
        failing_model(CudaError("an illegal address"), at=0, times=100),
    )
    async with serving(harness, loaded, name="w1", streams=held.streams, lease=LONG_LEASE) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=10)
        await held.wait_until(lambda: loaded.engine._runner.steps == 1 and loaded.engine.idle)
        assert not worker.task.done()
        held.go.set()
        assert await asyncio.wait_for(worker.task, 10) == 2
    assert (await published_events(harness, "a")).kinds == ["started"]
    assert (await client.state("a"))["last_error"] == "CUDA_ERROR"
    async with serving(harness, SharedModel.echo().fresh(), name="w2", lease=LONG_LEASE):
        result = await read_job(client, "a", idle_s=5)
    assert result.kinds == ["started", "resumed", "token", "end"]
    assert result.text == "abcabcabca"


async def test_a_device_lost_by_a_job_without_a_lease_ends_the_worker_too(fake):
    client, held, loaded = (
        fake.client(),
        HeldTake(fake),
        failing_model(CudaError("an illegal address"), at=0, times=100),
    )
    async with serving(fake, loaded, streams=held.streams, lease=LONG_LEASE) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=10)
        await held.wait_until(lambda: loaded.engine._runner.steps == 1 and loaded.engine.idle)
        await cancelled(fake, client)
        held.go.set()
        assert await asyncio.wait_for(worker.task, 10) == 2
    await wait_until_queue_is_empty(client)
    assert (await published_events(fake, "a")).kinds == ["error"]


@pytest.mark.parametrize(
    ("error", "code"),
    [(VramOom("full"), "VRAM_OOM"), (MemoryError("no more"), "VRAM_OOM"), (KeyError("a bug"), "INTERNAL")],
)
async def test_a_start_that_fails_is_published_as_error_after_started(fake, error, code):
    client, held, loaded = fake.client(), HeldTake(fake), failing_model(error, at=0)
    async with serving(fake, loaded, streams=held.streams, lease=LONG_LEASE) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=10)
        await held.wait_until(lambda: loaded.engine._runner.steps == 1 and loaded.engine.idle)
        assert (await published_events(fake, "a")).items == []
        held.go.set()
        result = await read_job(client, "a")
        assert (result.kinds, result.last.code) == (["started", "error"], code)
        await wait_until_engine_is_free(worker, loaded)
        assert (await run_job(client, prompt="abc", max_tokens=3)).text == "abc"


async def test_a_drain_during_take_hands_the_job_over(fake):
    client, held = fake.client(), HeldTake(fake)
    _, loaded = scripted(script=lambda step: time.sleep(0.01))
    async with serving(fake, loaded, name="w1", streams=held.streams, lease=LONG_LEASE, grace_s=0.0) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=300)
        await asyncio.wait_for(held.called.wait(), 10)
        worker.service.signal("test")
        (attempt,) = worker.service._attempts
        await held.wait_until(lambda: attempt.limits.stop_reason is not None)
        held.go.set()
        assert await asyncio.wait_for(worker.task, 5) == 0
        await wait_until_engine_is_free(worker, loaded)
    async with serving(fake, SharedModel.echo().fresh(), name="w2", lease=LONG_LEASE):
        result = await read_job(client, "a")
    assert result.text == "abc" * 100
    assert [r.reason for r in result.of("resumed")] == ["drain"]


async def test_an_engine_that_hangs_during_take_ends_the_worker_and_another_continues(fake):
    client, held, barrier = fake.client(), HeldTake(fake), StepBarrier(at=0)
    _, loaded = scripted(script=barrier.script)
    async with serving(fake, loaded, name="w1", streams=held.streams, lease=LONG_LEASE, stall_s=0.3) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=10)
        await asyncio.wait_for(held.called.wait(), 10)
        (attempt,) = worker.service._attempts
        await held.wait_until(lambda: attempt.limits.stop_reason is not None)
        held.go.set()
        assert await asyncio.wait_for(worker.task, 10) == 2
        async with serving(fake, SharedModel.echo().fresh(), name="w2", lease=LONG_LEASE):
            assert (await read_job(client, "a", idle_s=5)).text == "abcabcabca"
        barrier.release()
