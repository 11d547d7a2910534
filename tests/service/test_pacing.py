"""A step is launched late while the device computes, so that prompts that arrive are part of it."""

import threading
import time

import pytest

from tests.engine.ledger_runner import LookaheadRunner
from worker.engine import Engine, EngineSettings, Sequence
from worker.model import StepWait
from worker.service.engine_thread import Inbox
from worker.service.pacing import MARGIN_S, REMEMBERED, Pacing

STEP_S, LAUNCH_S = 0.020, 0.001


class Host:
    """A host that launches steps of `step_s` one ahead: in LAUNCH_S, with `after_s` of work after each wait."""

    def __init__(self, step_s=STEP_S, after_s=0.0):
        self.now = self.done_at = 100.0
        self.step_s, self.after_s = step_s, after_s
        self.idle_s = 0.0
        self.pacing = Pacing()
        self._alone = False

    def step(self, chunk_s=0.0, pause_s=0.0):
        """Launch the next step when it is due and wait for the one before; returns the delay."""
        began_at = max(self.now, self.pacing.due_at) + pause_s
        delay_s, previous = began_at - self.now, self.done_at
        launched_at = began_at + LAUNCH_S
        self.idle_s += max(0.0, launched_at - previous)
        self.done_at = max(launched_at, previous) + chunk_s + self.step_s
        ended_at = max(launched_at, previous)
        was_alone, self._alone = self._alone, not chunk_s
        wait = StepWait(launched_at, ended_at) if was_alone and self._alone else None
        self.now = ended_at + self.after_s
        self.pacing.stepped(began_at, wait)
        return delay_s

    def steps(self, count, **options):
        return [self.step(**options) for _ in range(count)]


def settled(host):
    host.steps(3 * REMEMBERED)
    host.idle_s = 0.0
    return host


@pytest.mark.parametrize("after_s", [0.0, 1.5 * MARGIN_S, 6 * MARGIN_S])
def test_a_step_is_launched_the_margin_before_the_device_is_idle(after_s):
    host = settled(Host(after_s=after_s))
    assert host.steps(200) == pytest.approx([STEP_S - LAUNCH_S - MARGIN_S - after_s] * 200)
    assert host.idle_s == 0.0


@pytest.mark.parametrize("after_s", [STEP_S - LAUNCH_S - MARGIN_S, 2 * STEP_S])
def test_steps_are_not_delayed_if_the_host_has_no_time_to_spare(after_s):
    host = settled(Host(after_s=after_s))
    assert host.steps(200) == pytest.approx([0.0] * 200)


def test_steps_that_are_not_longer_than_the_margin_are_not_delayed():
    assert settled(Host(step_s=LAUNCH_S + MARGIN_S)).steps(20) == pytest.approx([0.0] * 20)


def test_the_delay_ends_when_steps_become_short():
    host = settled(Host())
    host.step_s = MARGIN_S
    host.steps(30)
    idle_s = host.idle_s
    assert idle_s < STEP_S
    assert host.steps(20) == pytest.approx([0.0] * 20)
    assert host.idle_s == idle_s


def test_chunks_neither_are_delayed_nor_change_the_delay():
    host = settled(Host())
    delay_s = host.step()
    for chunks in (1, 2, 8):
        host.steps(chunks, chunk_s=0.05)
        assert host.steps(2) == [0.0, 0.0]
        assert host.steps(20) == pytest.approx([delay_s] * 20)
    assert host.idle_s == 0.0


def test_a_pause_without_work_is_not_taken_for_time_to_spare():
    host = settled(Host())
    host.steps(2 * REMEMBERED, pause_s=10.0)
    assert host.steps(REMEMBERED) == pytest.approx([0.0] * REMEMBERED)


class Device(LookaheadRunner):
    """A runner of a device that computes chunks, first draws and decode steps in order, in real time."""

    def __init__(self, step_s, chunk_s):
        super().__init__(400)
        self.step_s, self.chunk_s = step_s, chunk_s
        self.chunks_at, self.first_draws_at = [], []
        """When chunks were launched, and when the draws after them were complete."""
        self.idle_s = 0.0
        self._done_at, self._alone = 0.0, False

    def run(self, chunks, on_launched):
        now, previous = time.monotonic(), self._done_at
        self.idle_s += max(0.0, now - previous) if self._ahead else 0.0
        first_at = max(now, previous) + self.chunk_s * len(chunks)
        self._done_at = first_at + self.step_s
        self.chunks_at += [now] * len(chunks)
        self.first_draws_at += [first_at] * len(chunks)
        waited_for = self._ahead
        draws = super().run(chunks, on_launched)
        time.sleep(max(0.0, (previous if waited_for else first_at) - time.monotonic()))
        was_alone, self._alone = self._alone, not chunks
        self.step_wait = StepWait(now, time.monotonic()) if was_alone and self._alone else None
        return draws

    def first_draws(self):
        if self._first:
            time.sleep(max(0.0, self.first_draws_at[-1] - time.monotonic()))
        return super().first_draws()


@pytest.fixture
async def device(thread):
    """A device whose engine generates a long answer, with a delay before each step."""
    device = Device(0.3, 0.02)
    await thread.own(Engine(device, EngineSettings(512, 64, 4, prefix_cache=False)))
    thread.add(Sequence("long", [7], 200), Inbox(lambda: None))
    wait_for_steps(thread, REMEMBERED + 3)
    yield device
    thread.abort("long")


def wait_for_steps(thread, count):
    """Wait for the end of that many steps, without the event loop."""
    end = thread.steps + count
    while thread.steps < end:
        time.sleep(0.0005)


async def test_a_prompt_that_arrives_while_the_device_computes_is_launched_at_once(thread, device):
    waits_s, late_s = [], []
    for number in range(3):
        wait_for_steps(thread, 3)
        came, inbox, added_at = threading.Event(), Inbox(lambda: None), time.monotonic()
        inbox.put = lambda token, at, came=came: came.set()
        thread.add(Sequence(f"short {number}", [1, 2, 3], 2), inbox)
        assert came.wait(10)
        waits_s.append(device.chunks_at[-1] - added_at)
        late_s.append(time.monotonic() - device.first_draws_at[-1])
    assert min(waits_s) < 0.15
    assert min(late_s) < 0.15


async def test_an_abort_is_not_delayed(thread, device):
    wait_for_steps(thread, 1)
    began_at = time.monotonic()
    await thread.abort("long")
    assert time.monotonic() - began_at < 0.25
