"""A step is launched late while the device computes, so that prompts that arrive are part of it."""

import threading
import time

import pytest

from tests.engine.ledger_runner import LookaheadRunner
from worker.engine import Engine, EngineSettings, Sequence
from worker.service.engine_thread import Inbox
from worker.service.pacing import MARGIN_S, REMEMBERED, Pacing

STEP_S, HOST_S = 0.020, 0.001


class Device:
    """A device whose steps take `step_s`, and a host whose work before a launch takes HOST_S."""

    def __init__(self, step_s=STEP_S):
        self.now = self.done_at = 100.0
        self.step_s = step_s
        self.idle_s = 0.0
        self.pacing = Pacing()

    def step(self, pause_s=0.0):
        """Wait as the pacing says, launch the next step and wait for the one before it; returns the delay."""
        began = max(self.now, self.pacing.due_at) + pause_s
        delay_s, previous = began - self.now, self.done_at
        self.pacing.began(began)
        self.now = began + HOST_S
        self.pacing.launched(self.now)
        self.idle_s += max(0.0, self.now - previous)
        self.done_at = max(self.now, previous) + self.step_s
        self.now = max(self.now, previous)
        self.pacing.ended(self.now)
        return delay_s


def settled(device):
    for _ in range(2 * REMEMBERED):
        device.step()
    device.idle_s = 0.0
    return device


def test_a_step_is_launched_the_margin_before_the_device_is_idle():
    device = settled(Device())
    delays = [device.step() for _ in range(50)]
    assert delays == pytest.approx([STEP_S - HOST_S - MARGIN_S] * 50)
    assert device.idle_s == 0.0


def test_steps_that_are_not_longer_than_the_margin_are_not_delayed():
    device = settled(Device(step_s=HOST_S + MARGIN_S))
    assert [device.step() for _ in range(20)] == pytest.approx([0.0] * 20)


def test_the_delay_ends_when_steps_become_short():
    device = settled(Device())
    device.step_s = MARGIN_S
    for _ in range(30):
        device.step()
    idle_s = device.idle_s
    assert idle_s < STEP_S
    assert [device.step() for _ in range(20)] == pytest.approx([0.0] * 20)
    assert device.idle_s == idle_s


def test_a_pause_without_work_is_not_taken_for_time_to_wait():
    device = settled(Device())
    for _ in range(2 * REMEMBERED):
        assert device.step(pause_s=10.0) < 10.0 + STEP_S


class AsyncRunner(LookaheadRunner):
    """A runner whose device takes `step_s` for the steps that were launched, one after another."""

    def __init__(self, step_s):
        super().__init__(400)
        self.step_s = step_s
        self.chunks_at = []
        self._done_at = 0.0

    def run(self, chunks, on_launched):
        previous = self._done_at
        self.chunks_at += [time.monotonic() for _ in chunks]
        self._done_at = max(time.monotonic(), previous) + self.step_s
        draws = super().run(chunks, on_launched)
        time.sleep(max(0.0, previous - time.monotonic()))
        return draws


async def test_a_prompt_that_arrives_while_the_device_computes_is_launched_at_once(thread):
    runner = AsyncRunner(0.3)
    await thread.own(Engine(runner, EngineSettings(512, 64, 4, prefix_cache=False)))
    thread.add(Sequence("long", [7], 200), Inbox(lambda: None))
    ready = threading.Event()
    waits_s = []
    for number in range(3):
        steps = thread.steps
        while thread.steps <= steps + REMEMBERED:
            ready.wait(0.001)
        added_at = time.monotonic()
        await thread.add(Sequence(f"short {number}", [1, 2, 3], 1), Inbox(lambda: None))
        waits_s.append(runner.chunks_at[-1] - added_at)
    assert min(waits_s) < 0.15
    thread.abort("long")
