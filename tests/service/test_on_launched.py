"""The result of `EngineThread.add` is delivered when a step is launched: not before, and always.

What the engine's thread delivers before a barrier is on the loop before the loop sees the barrier.
"""

from __future__ import annotations

import asyncio
import threading

import pytest

from tests.service.inboxes import read_inbox
from tests.service.models import ScriptedRunner, SharedModel, StepBarrier
from tests.service.serving import LONG_LEASE, HeldTake, read_job, serving
from worker.engine import Sequence
from worker.errors import CudaError, InvalidRequest, VramOom
from worker.service.engine_thread import Inbox


def nothing(step):
    """A script that does nothing."""


class NeverLaunchedRunner(ScriptedRunner):
    """A runner that does not wait for its device and so never calls `on_launched`."""

    def run(self, chunks, on_launched):
        return super().run(chunks, lambda: None)


class Added:
    """A sequence of three tokens, added to the thread's engine."""

    def __init__(self, thread, name="a", max_tokens=3, **kwargs):
        self._woken = asyncio.Event()
        self.inbox = Inbox(self._woken.set)
        self.cached = thread.add(Sequence(name, [7], max_tokens), self.inbox, **kwargs)

    async def items(self, count):
        return await read_inbox(self.inbox, self._woken, count)


async def own(thread, script=nothing, launch=nothing, kind=ScriptedRunner):
    model = SharedModel.echo()
    engine = model.fresh(kind(model.runner, script, launch)).engine
    await thread.own(engine)
    return engine


def block(thread):
    """Block the thread until the event is set, so that it finds all submitted work at once."""
    over = threading.Event()
    thread.call(lambda: over.wait(30))
    return over


async def test_the_result_is_delivered_when_the_step_is_launched_and_before_it_is_done(thread):
    launch, compute = StepBarrier(at=0), StepBarrier(at=0)
    await own(thread, compute.script, launch.script)
    added = Added(thread)
    await launch.wait_until_reached()
    assert not added.cached.done()
    launch.release()
    await compute.wait_until_reached()
    assert added.cached.done()
    assert added.cached.result() == thread.steps == 0
    compute.release()
    assert len(await added.items(3)) == 3


async def test_a_refusal_a_paused_sequence_and_other_calls_are_answered_at_once(thread):
    launch = StepBarrier(at=0)
    await own(thread, launch=launch.script)
    over = block(thread)
    added, refused, called = Added(thread), Added(thread, "b", 100_000), thread.call(lambda: "here")
    paused = Added(thread, "c", paused=True)
    over.set()
    await launch.wait_until_reached()
    assert isinstance(refused.cached.exception(), InvalidRequest)
    assert called.result() == "here"
    assert paused.cached.result() == 0
    assert not added.cached.done()
    launch.release()
    assert await added.cached == 0


async def test_a_paused_sequence_draws_nothing_before_it_is_resumed(thread):
    engine = await own(thread)
    added = Added(thread, paused=True)
    assert await added.cached == 0
    assert engine.idle
    assert not thread.busy
    await thread.resume(Sequence("a", [7], 5))
    assert [token.index for token, _ in await added.items(5)] == [0, 1, 2, 3, 4]


async def test_a_failed_step_leaves_a_paused_sequence_to_be_resumed(thread):
    def fails_once(step):
        if step == 0:
            raise KeyError("a bug")

    await own(thread, fails_once)
    paused, failed = Added(thread, "paused", paused=True), Added(thread, "failed")
    assert await failed.items(1) == []
    assert isinstance(failed.inbox.error, KeyError)
    await thread.resume(Sequence("paused", [7], 3))
    assert len(await paused.items(3)) == 3


@pytest.mark.parametrize("error", [CudaError("lost"), VramOom("full"), KeyError("a bug")])
async def test_a_step_that_fails_before_it_is_launched_delivers_the_result_too(thread, error):
    def fails(step):
        raise error

    engine = await own(thread, launch=fails)
    added = Added(thread)
    assert await asyncio.wait_for(added.cached, 10) == 0
    assert await added.items(1) == []
    assert added.inbox.error is error
    assert engine.idle
    assert not thread.busy


async def test_a_step_that_never_calls_on_launched_delivers_the_result_at_its_end(thread):
    first, second = StepBarrier(at=0), StepBarrier(at=1)
    await own(thread, second.script, first.script, kind=NeverLaunchedRunner)
    added = Added(thread)
    await first.wait_until_reached()
    assert not added.cached.done()
    first.release()
    await second.wait_until_reached()
    assert added.cached.done()
    second.release()


async def test_the_next_step_delivers_several_results_and_skips_cancelled_ones(thread):
    launch, faults = StepBarrier(at=0), []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: faults.append(context))
    await own(thread, launch=launch.script)
    over = block(thread)
    first, cancelled_before, second, cancelled_after = (Added(thread, name) for name in "abcd")
    cancelled_before.cached.cancel()
    over.set()
    await launch.wait_until_reached()
    cancelled_after.cached.cancel()
    assert not first.cached.done()
    assert not second.cached.done()
    launch.release()
    assert await asyncio.wait_for(asyncio.gather(first.cached, second.cached), 10) == [0, 0]
    for added in (first, second, cancelled_after):  # a caller that cancels late removes its sequence by `release`
        assert len(await added.items(3)) == 3
    assert cancelled_before.inbox.take() == faults == []
    assert thread.steps == 9


@pytest.mark.parametrize("end", [lambda thread: thread.release("a"), lambda thread: thread.stop()])
async def test_without_a_next_step_the_result_is_delivered_too(thread, end):
    await own(thread)
    over = block(thread)
    added = Added(thread)
    end(thread)
    over.set()
    assert await asyncio.wait_for(added.cached, 10) == 0
    assert thread.steps == 0


async def test_take_is_called_once_the_first_step_is_launched(fake):
    client, held, launch, model = fake.client(), HeldTake(fake), StepBarrier(at=0), SharedModel.echo()
    runner = ScriptedRunner(model.runner, nothing, launch.script)
    async with serving(fake, model.fresh(runner), streams=held.streams, lease=LONG_LEASE):
        await client.submit(job_id="a", prompt="abc", max_tokens=5)
        await launch.wait_until_reached()
        for _ in range(100):
            await asyncio.sleep(0)
        assert not held.called.is_set()
        launch.release()
        await asyncio.wait_for(held.called.wait(), 10)
        held.go.set()
        assert (await read_job(client, "a")).text == "abcab"


async def test_when_a_launch_hangs_the_worker_exits_and_the_job_is_free_after_its_lease(fake):
    client, launch, model = fake.client(), StepBarrier(at=0), SharedModel.echo()
    runner = ScriptedRunner(model.runner, nothing, launch.script)
    async with serving(fake, model.fresh(runner), stall_s=0.3) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=10)
        assert await asyncio.wait_for(worker.task, 10) == 2
        async with serving(fake, SharedModel.echo().fresh(), name="w2"):
            assert (await read_job(client, "a", idle_s=5)).text == "abcabcabca"
        launch.release()
