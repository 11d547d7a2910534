"""For a moment after a job the loop does not sleep while the worker waits for the next one, where there are cores."""

from __future__ import annotations

import asyncio
import os
import time

import pytest

from tests.service.serving import Model, ask, serving
from worker.service.alertness import Alertness

AWAKE = 0.2
"""Of a core: a loop that sleeps takes a hundredth, one that does not all that others leave it."""


@pytest.fixture
def spare_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)


async def busy_share(seconds):
    """How much of a core this process takes while its loop has nothing to do but what others keep it at."""
    began, used = time.monotonic(), time.process_time()
    await asyncio.sleep(seconds)
    return (time.process_time() - used) / (time.monotonic() - began)


async def test_the_loop_is_awake_while_it_waits_and_the_moment_lasts(spare_cores):
    alertness = Alertness(0.2)
    with alertness.waiting():
        assert await busy_share(0.1) < AWAKE, "no job has ended yet"
    alertness.renew()
    with alertness.waiting():
        assert await busy_share(0.1) > AWAKE
        await asyncio.sleep(0.15)
        assert await busy_share(0.1) < AWAKE, "the moment is over"


async def test_the_loop_sleeps_again_when_the_wait_is_over(spare_cores):
    alertness = Alertness(10)
    alertness.renew()
    with pytest.raises(TimeoutError), alertness.waiting():
        raise TimeoutError
    await asyncio.sleep(0.01)
    assert await busy_share(0.1) < AWAKE


async def test_a_machine_of_few_cores_is_left_alone(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    alertness = Alertness(10)
    alertness.renew()
    with alertness.waiting():
        assert await busy_share(0.1) < AWAKE


async def test_a_worker_is_alert_after_a_job_and_not_before(spare_cores, fake):
    async with serving(fake, Model.echo().fresh(), alert_ms=400):
        await asyncio.sleep(0.2)
        before = await busy_share(0.2)
        await ask(fake.client(), prompt="abc", max_tokens=2)
        after = await busy_share(0.2)
        await asyncio.sleep(0.4)
        assert before < AWAKE < after
        assert await busy_share(0.2) < AWAKE
