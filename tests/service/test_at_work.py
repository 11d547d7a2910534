"""The loop hears of an answer's beginning when the device is at work on it: not before, and in any case.

What the engine's thread tells before it comes to a gate is on the loop before the loop learns that it came there.
"""

from __future__ import annotations

import asyncio
import threading

import pytest

from tests.service.serving import Gate, Model, Scripted, serving, story
from tests.service.test_head_start import LONG, Held
from tests.service.test_parts import drawn
from worker.engine import Sequence
from worker.errors import CudaError, InvalidRequest, VramOom
from worker.service.engine_thread import Inbox


def nothing(step):
    """No script at all."""


class Silent(Scripted):
    """A runner that waits for nothing, so it never says that it is at work."""

    def run(self, batch, requests, on_launched):
        return super().run(batch, requests, lambda: None)


class Begun:
    """An answer of three tokens that the thread is asked to begin."""

    def __init__(self, thread, name="a", max_tokens=3):
        self._woken = asyncio.Event()
        self.inbox = Inbox(self._woken.set)
        self.told = thread.begin(Sequence(name, [7], max_tokens), self.inbox)

    async def items(self, count):
        return await drawn(self.inbox, self._woken, count)


async def own(thread, script=nothing, launch=nothing, kind=Scripted):
    model = Model.echo()
    engine = model.fresh(kind(model.runner, script, launch)).engine
    await thread.own(engine)
    return engine


def busy(thread):
    """Let the thread do nothing else until the event is set, so that all that it is asked meanwhile comes together."""
    over = threading.Event()
    thread.call(lambda: over.wait(30))
    return over


async def test_a_beginning_is_told_when_the_device_is_at_work_and_before_it_is_done(thread):
    launch, compute = Gate(at=0), Gate(at=0)
    await own(thread, compute.script, launch.script)
    begun = Begun(thread)
    await launch.until_reached()
    assert not begun.told.done()
    launch.open()
    await compute.until_reached()
    assert begun.told.done()
    assert begun.told.result() == thread.steps == 0
    compute.open()
    assert len(await begun.items(3)) == 3


async def test_a_refusal_and_all_else_that_was_asked_are_told_at_once(thread):
    launch = Gate(at=0)
    await own(thread, launch=launch.script)
    over = busy(thread)
    begun, refused, asked = Begun(thread), Begun(thread, "b", 100_000), thread.call(lambda: "here")
    over.set()
    await launch.until_reached()
    assert isinstance(refused.told.exception(), InvalidRequest)
    assert asked.result() == "here"
    assert not begun.told.done()
    launch.open()
    assert await begun.told == 0


@pytest.mark.parametrize("error", [CudaError("lost"), VramOom("full"), KeyError("a bug")])
async def test_a_step_that_fails_before_the_device_is_at_work_tells_too(thread, error):
    def fails(step):
        raise error

    engine = await own(thread, launch=fails)
    begun = Begun(thread)
    assert await asyncio.wait_for(begun.told, 10) == 0
    assert await begun.items(1) == [error]
    assert engine.idle
    assert not thread.busy


async def test_a_step_that_waits_for_nothing_tells_when_it_is_over(thread):
    first, second = Gate(at=0), Gate(at=1)
    await own(thread, second.script, first.script, kind=Silent)
    begun = Begun(thread)
    await first.until_reached()
    assert not begun.told.done()
    first.open()
    await second.until_reached()
    assert begun.told.done()
    second.open()


async def test_the_step_after_several_beginnings_tells_them_all_and_whoever_left_is_left_alone(thread):
    launch, faults = Gate(at=0), []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: faults.append(context))
    await own(thread, launch=launch.script)
    over = busy(thread)
    first, never, second, left = (Begun(thread, name) for name in "abcd")
    never.told.cancel()
    over.set()
    await launch.until_reached()
    left.told.cancel()
    assert not first.told.done()
    assert not second.told.done()
    launch.open()
    assert await asyncio.wait_for(asyncio.gather(first.told, second.told), 10) == [0, 0]
    for begun in (first, second, left):  # who left has the thread forget it, by `release`
        assert len(await begun.items(3)) == 3
    assert never.inbox.take() == faults == []
    assert thread.steps == 9


@pytest.mark.parametrize("end", [lambda thread: thread.release("a"), lambda thread: thread.stop()])
async def test_a_beginning_that_no_step_follows_is_told_too(thread, end):
    await own(thread)
    over = busy(thread)
    begun = Begun(thread)
    end(thread)
    over.set()
    assert await asyncio.wait_for(begun.told, 10) == 0
    assert thread.steps == 0


async def test_take_is_asked_for_once_the_device_is_at_work(fake):
    client, held, launch, model = fake.client(), Held(fake), Gate(at=0), Model.echo()
    async with serving(
        fake, model.fresh(Scripted(model.runner, nothing, launch.script)), streams=held.streams, lease=LONG
    ):
        await client.submit(job_id="a", prompt="abc", max_tokens=5)
        await launch.until_reached()
        for _ in range(100):
            await asyncio.sleep(0)
        assert not held.asked.is_set()
        launch.open()
        await asyncio.wait_for(held.asked.wait(), 10)
        held.go.set()
        assert (await story(client, "a")).text == "abcab"


async def test_an_engine_that_hangs_in_a_launch_ends_the_worker_and_the_end_of_the_lease_frees_the_job(fake):
    client, launch, model = fake.client(), Gate(at=0), Model.echo()
    async with serving(fake, model.fresh(Scripted(model.runner, nothing, launch.script)), stall_s=0.3) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=10)
        assert await asyncio.wait_for(worker.task, 10) == 2
        async with serving(fake, Model.echo().fresh(), name="w2"):
            assert (await story(client, "a", idle_s=5)).text == "abcabcabca"
        launch.open()
