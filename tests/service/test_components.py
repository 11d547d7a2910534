"""Unit tests of the engine thread and of an attempt's token buffer, statistics and limits."""

from __future__ import annotations

import asyncio
import hashlib
import math
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.models import free_kv_blocks
from tests.service.inboxes import read_inbox
from tests.service.models import ScriptedRunner, SharedModel, StepBarrier
from worker.answer import AttemptStats
from worker.config import ServiceSection
from worker.engine import Sequence
from worker.errors import Cancelled, InferenceTimeout, InvalidRequest
from worker.jobs.events import Token
from worker.service.engine_thread import Inbox, TimedToken
from worker.service.generation import TokenBuffer
from worker.service.prepared_job import AttemptInterrupted, AttemptLimits, PreparedJob, StopReason


async def test_drawn_tokens_arrive_in_order_and_with_their_times(thread):
    await thread.own(SharedModel.echo().fresh().engine)
    woken = asyncio.Event()
    inbox, began = Inbox(woken.set), time.monotonic()
    await thread.add(Sequence("a", [7, 8, 9], 100), inbox)
    items = await read_inbox(inbox, woken, 100)
    assert [item.token.draw.id for item in items] == ([7, 8, 9] * 34)[:100]
    assert began <= items[0].at <= items[-1].at <= time.monotonic()
    assert not thread.busy
    assert thread.steps == 100


async def test_submitted_work_runs_between_two_steps_on_the_thread(thread):
    barrier, model = StepBarrier(at=1), SharedModel.echo()
    await thread.own(model.fresh(ScriptedRunner(model.runner, barrier.script)).engine)
    woken = asyncio.Event()
    await thread.add(Sequence("a", [7], 1000), Inbox(woken.set))
    await barrier.wait_until_reached()
    assert thread.busy
    name = thread.call(lambda: threading.current_thread().name)
    aborted = thread.abort("a")
    await asyncio.sleep(0.05)
    assert not name.done(), "the step still runs"
    barrier.release()
    assert await name == "engine"
    await aborted
    assert not thread.busy


async def test_submitted_work_may_raise_without_harm(thread):
    with pytest.raises(ZeroDivisionError):
        await thread.call(lambda: 1 // 0)
    with pytest.raises(RuntimeError, match="no engine yet"):
        await thread.abort("a")
    await thread.own(SharedModel.echo().fresh().engine)
    with pytest.raises(InvalidRequest):
        await thread.add(Sequence("a", [7], 100_000), Inbox(lambda: None))
    assert not thread.busy


async def test_a_failed_step_ends_every_sequence_and_releases_its_memory(thread):
    model = SharedModel.echo()
    engine = model.fresh(ScriptedRunner(model.runner, lambda step: 1 // (2 - step))).engine
    await thread.own(engine)
    woken = asyncio.Event()
    inbox = Inbox(woken.set)
    await thread.add(Sequence("a", [7], 100), inbox)
    items = await read_inbox(inbox, woken, 3)
    assert [type(item) for item in items] == [TimedToken, TimedToken, ZeroDivisionError]
    assert engine.idle
    assert free_kv_blocks(engine) == free_kv_blocks(model.loaded.engine)


@given(st.lists(st.tuples(st.floats(0, 0.05), st.booleans()), max_size=120))
def test_every_token_leaves_the_buffer_once_in_order_and_in_time(steps):
    buffer, now, out, waiting = TokenBuffer(ServiceSection()), 0.0, [], []
    for index, (pause, look) in enumerate(steps):
        now += pause
        buffer.add(Token(index, 7, "x"), now)
        waiting.append(now)
        assert buffer.due <= waiting[0] + 0.015 + 1e-9
        assert buffer.due <= now or (index and len(waiting) < 16)
        if look and buffer.due <= now:
            out += buffer.take()
            waiting = []
            assert buffer.due == math.inf
    out += buffer.take()
    assert [token.i for event in out for token in event.tokens] == list(range(len(steps)))
    assert all(1 <= len(event.tokens) <= 16 for event in out)


def test_stats_count_from_the_claim():
    stats = AttemptStats(claimed=10.0)
    assert (stats.ttft_s, stats.decode_s, stats.tokens_per_second) == (0, 0, 0)
    assert stats.count("a", 10.5) is None
    assert stats.count("é", 11.5) == pytest.approx(1.0)
    assert (stats.ttft_s, stats.decode_s, stats.tokens_per_second) == (0.5, 1.0, 1.0)
    assert (stats.tokens, stats.chars) == (2, 2)
    assert stats.text_digest.hexdigest() == hashlib.sha256("aé".encode()).hexdigest()


async def test_the_highest_stop_reason_counts():
    limits = AttemptLimits(10)
    limits.check()
    limits.interrupt(StopReason.CANCEL)
    with pytest.raises(Cancelled):
        limits.check()
    limits.interrupt(StopReason.LOST)
    limits.interrupt(StopReason.DRAIN)
    with pytest.raises(AttemptInterrupted) as caught:
        limits.check()
    assert caught.value.reason is StopReason.LOST


async def test_the_timeout_pauses_during_a_replay():
    limits, now = AttemptLimits(0.2), time.monotonic()
    limits.start_timeout()
    limits.exclude_replay(now + 1, last=False)
    limits.exclude_replay(now + 5, last=True)
    await asyncio.sleep(0.25)
    limits.check()
    spent = AttemptLimits(0.2)
    spent.start_timeout()
    await asyncio.sleep(0.25)
    spent.check(replaying=True)
    with pytest.raises(InferenceTimeout):
        spent.check()


async def test_guard_cancels_its_work_at_the_deadline():
    limits = AttemptLimits(10)
    assert await limits.guard(asyncio.sleep(0, "done")) == "done"
    limits.set_deadline(0.05)
    began = time.monotonic()
    with pytest.raises(InferenceTimeout):
        await limits.guard(asyncio.sleep(5))
    assert time.monotonic() - began < 1
    with pytest.raises(ZeroDivisionError):
        await AttemptLimits(10).guard(_fails())


async def _fails():
    raise ZeroDivisionError


def test_a_prompt_is_hashed_as_little_endian_uint32():
    assert PreparedJob(None, [1, 258], None, 0).prompt_hash == hashlib.sha256(b"\x01\0\0\0\x02\x01\0\0").hexdigest()
