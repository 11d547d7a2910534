"""The parts below the service, each alone: engine thread, outbox, bounds."""

from __future__ import annotations

import asyncio
import hashlib
import math
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.service.serving import Gate, Model, Scripted
from worker.config import ServiceSection
from worker.engine import Sequence
from worker.errors import Cancelled, InferenceTimeout, InvalidRequest
from worker.jobs.events import Token
from worker.service.bounds import Bounds, Stop, Stopped
from worker.service.engine_thread import Drawn, Inbox
from worker.service.outbox import Figures, Outbox
from worker.service.question import prompt_hash


async def drawn(inbox, woken, count):
    items = []
    while len(items) < count:
        await asyncio.wait_for(woken.wait(), 10)
        woken.clear()
        items += inbox.take()
    return items


async def test_what_an_engine_draws_arrives_in_order_and_with_its_time(thread):
    await thread.own(Model.echo().fresh().engine)
    woken = asyncio.Event()
    inbox, began = Inbox(woken.set), time.monotonic()
    await thread.add(Sequence("a", [7, 8, 9], 100), inbox)
    items = await drawn(inbox, woken, 100)
    assert [item.token.draw.id for item in items] == ([7, 8, 9] * 34)[:100]
    assert began <= items[0].at <= items[-1].at <= time.monotonic()
    assert not thread.busy
    assert thread.steps == 100


async def test_work_runs_between_two_steps_on_the_thread(thread):
    gate, model = Gate(at=1), Model.echo()
    await thread.own(model.fresh(Scripted(model.runner, gate.script)).engine)
    woken = asyncio.Event()
    await thread.add(Sequence("a", [7], 1000), Inbox(woken.set))
    await gate.until_reached()
    assert thread.busy
    asked = thread.call(lambda: threading.current_thread().name)
    aborted = thread.abort("a")
    await asyncio.sleep(0.05)
    assert not asked.done(), "a step is under way"
    gate.open()
    assert await asked == "engine"
    await aborted
    assert not thread.busy


async def test_what_the_thread_is_asked_may_fail_without_harm(thread):
    with pytest.raises(ZeroDivisionError):
        await thread.call(lambda: 1 // 0)
    with pytest.raises(RuntimeError, match="no engine yet"):
        await thread.abort("a")
    await thread.own(Model.echo().fresh().engine)
    with pytest.raises(InvalidRequest):
        await thread.add(Sequence("a", [7], 100_000), Inbox(lambda: None))
    assert not thread.busy


async def test_a_failed_step_ends_every_sequence_and_frees_its_memory(thread):
    model = Model.echo()
    engine = model.fresh(Scripted(model.runner, lambda step: 1 // (2 - step))).engine
    await thread.own(engine)
    woken = asyncio.Event()
    inbox = Inbox(woken.set)
    await thread.add(Sequence("a", [7], 100), inbox)
    items = await drawn(inbox, woken, 3)
    assert [type(item) for item in items] == [Drawn, Drawn, ZeroDivisionError]
    assert engine.idle
    assert engine.free_kv_blocks == model.served.engine.free_kv_blocks


@given(st.lists(st.tuples(st.floats(0, 0.05), st.booleans()), max_size=120))
def test_every_token_leaves_the_outbox_once_in_order_and_in_time(steps):
    outbox, now, out, waiting = Outbox(ServiceSection()), 0.0, [], []
    for index, (pause, look) in enumerate(steps):
        now += pause
        outbox.add(Token(index, 7, "x"), now)
        waiting.append(now)
        assert outbox.due <= waiting[0] + 0.015 + 1e-9
        assert outbox.due <= now or (index and len(waiting) < 16)
        if look and outbox.due <= now:
            out += outbox.take()
            waiting = []
            assert outbox.due == math.inf
    out += outbox.take()
    assert [token.i for event in out for token in event.tokens] == list(range(len(steps)))
    assert all(1 <= len(event.tokens) <= 16 for event in out)


def test_figures_count_from_the_claim():
    figures = Figures(claimed=10.0)
    assert (figures.ttft_s, figures.decode_s, figures.rate, figures.total_s) == (0, 0, 0, 0)
    assert figures.count("a", 10.5) is None
    assert figures.count("é", 11.5) == pytest.approx(1.0)
    assert (figures.ttft_s, figures.decode_s, figures.rate, figures.total_s) == (0.5, 1.0, 1.0, 1.5)
    assert (figures.tokens, figures.chars) == (2, 2)
    assert figures.text_sha256 == hashlib.sha256("aé".encode()).hexdigest()


async def test_the_gravest_reason_to_stop_counts():
    bounds = Bounds(10)
    bounds.check()
    bounds.interrupt(Stop.CANCEL)
    with pytest.raises(Cancelled):
        bounds.check()
    bounds.interrupt(Stop.LOST)
    bounds.interrupt(Stop.DRAIN)
    with pytest.raises(Stopped) as caught:
        bounds.check()
    assert caught.value.why is Stop.LOST


async def test_replay_stands_still_for_the_time_allowed():
    bounds, now = Bounds(0.2), time.monotonic()
    bounds.start_engine()
    bounds.replayed(now + 1, last=False)
    bounds.replayed(now + 5, last=True)
    await asyncio.sleep(0.25)
    bounds.check()
    spent = Bounds(0.2)
    spent.start_engine()
    await asyncio.sleep(0.25)
    spent.check(replaying=True)
    with pytest.raises(InferenceTimeout):
        spent.check()


async def test_a_guarded_work_is_left_when_the_time_is_up():
    bounds = Bounds(10)
    assert await bounds.guard(asyncio.sleep(0, "done")) == "done"
    bounds.expire_in(0.05)
    began = time.monotonic()
    with pytest.raises(InferenceTimeout):
        await bounds.guard(asyncio.sleep(5))
    assert time.monotonic() - began < 1
    with pytest.raises(ZeroDivisionError):
        await Bounds(10).guard(_fails())


async def _fails():
    raise ZeroDivisionError


def test_a_prompt_is_hashed_as_little_endian_words():
    assert prompt_hash([1, 258]) == hashlib.sha256(b"\x01\0\0\0\x02\x01\0\0").hexdigest()
