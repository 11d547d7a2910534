"""Unit tests of the engine thread and of an attempt's token buffer, statistics and limits."""

from __future__ import annotations

import asyncio
import hashlib
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
from worker.engine import DrawnToken, Sequence
from worker.errors import Cancelled, InferenceTimeout, InvalidRequest
from worker.jobs.events import Token
from worker.sampling import Draw
from worker.service.engine_thread import Inbox
from worker.service.generation import TokenBuffer
from worker.service.prepared_job import AttemptInterrupted, AttemptLimits, PreparedJob, StopReason


async def test_drawn_tokens_arrive_in_order_and_with_their_times(thread):
    await thread.own(SharedModel.echo().fresh().engine)
    woken = asyncio.Event()
    inbox, began = Inbox(woken.set), time.monotonic()
    await thread.add(Sequence("a", [7, 8, 9], 100), inbox)
    items = await read_inbox(inbox, woken, 100)
    assert [token.draw.id for token, _ in items] == ([7, 8, 9] * 34)[:100]
    assert began <= items[0][1] <= items[-1][1] <= time.monotonic()
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
    assert [token.draw.id for token, _ in items] == [7, 7]
    assert isinstance(inbox.error, ZeroDivisionError)
    assert engine.idle
    assert free_kv_blocks(engine) == free_kv_blocks(model.loaded.engine)


class Wakes:
    """An inbox whose calls of `wake` are counted, as the engine's thread would request them."""

    def __init__(self, limit):
        self.inbox, self.count, self._index = Inbox(lambda: None), 0, 0
        self.inbox.limit = limit

    def put(self, finish=None):
        token = DrawnToken("a", self._index, Draw(7), False, finish)
        self._index += 1
        self.count += self.inbox.put(token, float(self._index))


def test_an_inbox_wakes_for_its_first_item_and_when_it_becomes_urgent():
    wakes = Wakes(limit=3)
    for expected, urgent in ((1, False), (1, False), (2, True), (2, True)):
        wakes.put()
        assert (wakes.count, wakes.inbox.urgent) == (expected, urgent)
    assert [token.index for token, _ in wakes.inbox.take()] == [0, 1, 2, 3]
    assert not wakes.inbox.urgent
    wakes.put()
    wakes.put(finish="stop")
    assert (wakes.count, wakes.inbox.urgent) == (4, True)
    assert [at for _, at in wakes.inbox.take()] == [5.0, 6.0]
    assert wakes.inbox.take() == []


def test_an_inbox_loses_no_item_and_no_wake_between_two_threads(short_switch_interval):
    """The reader takes items only after a wake, as the event loop does."""
    count, taken = 20_000, []
    inbox, wake = Inbox(lambda: None), threading.Semaphore(0)
    inbox.limit = 4

    def write():
        for index in range(count):
            if inbox.put(DrawnToken("a", index, Draw(7), False, None), 0.0):
                wake.release()

    writer = threading.Thread(target=write)
    writer.start()
    while len(taken) < count:
        assert wake.acquire(timeout=10), f"no wake after {len(taken)} items"
        taken += [token.index for token, _ in inbox.take()]
    writer.join()
    assert taken == list(range(count))


@given(st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=30))
def test_every_token_leaves_the_buffer_once_and_in_order(steps):
    buffer, count, out = TokenBuffer(ServiceSection()), 0, []
    for added, take in steps:
        buffer.add([Token(index, 7, "x") for index in range(count, count + added)])
        count += added
        assert len(buffer) + sum(len(event.tokens) for event in out) == count
        assert buffer.has_first == (not out and count > 0)
        assert buffer.full == (len(buffer) >= 16)
        if take:
            out += buffer.take()
    out += buffer.take()
    assert [token.i for event in out for token in event.tokens] == list(range(count))
    assert all(1 <= len(event.tokens) <= 16 for event in out)


def test_stats_count_from_the_claim():
    stats = AttemptStats(claimed=10.0)
    assert (stats.ttft_s, stats.decode_s, stats.tokens_per_second) == (0, 0, 0)
    assert stats.count("a", [10.5]) == []
    assert stats.count("é", [11.0, 11.5]) == pytest.approx([0.5, 0.5])
    assert (stats.ttft_s, stats.decode_s, stats.tokens_per_second) == (0.5, 1.0, 2.0)
    assert (stats.tokens, stats.chars) == (3, 2)
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
