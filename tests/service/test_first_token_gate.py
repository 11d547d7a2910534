"""While a job waits for its first token, the worker neither reports nor queries its device."""

from __future__ import annotations

import asyncio
import time

from tests.jobs.harness import LossyStreams, wait_until
from tests.service.models import FixedDevice, ScriptedRunner, SharedModel, StepBarrier
from tests.service.serving import read_job, run_job, serving, worker_events
from worker.backend import MemoryUse
from worker.service.reporter import FirstTokenGate

REPORTS = {"add", "put_status"}


class RecordingDevice(FixedDevice):
    """A device that records which queries it gets."""

    def __init__(self, calls):
        super().__init__(MemoryUse(weights=1))
        self._calls = calls

    def memory(self):
        self._calls.append("memory")
        return super().memory()

    def non_resident(self):
        self._calls.append("non_resident")
        return super().non_resident()


def recording(harness, calls):
    async def before(name):
        calls.append(name)

    return LossyStreams(harness.connect(), lambda name: False, before)


async def test_reports_wait_for_the_first_token(fake):
    client, barrier, model, calls = fake.client(), StepBarrier(at=0), SharedModel.echo(), []
    loaded = model.fresh(ScriptedRunner(model.runner, barrier.script), device=RecordingDevice(calls))
    section = {"vram_s": 0.05, "heartbeat_s": 0.3, "residency_s": 0.05}
    async with serving(fake, loaded, streams=recording(fake, calls), **section) as worker:
        await asyncio.sleep(0.4)  # the next heartbeat is due at once
        await client.submit(job_id="a", prompt="abc", max_tokens=500)
        await barrier.wait_until_reached()
        worker.service._reporter.loading(1, 1)
        since = len(calls)
        await asyncio.sleep(0.3)
        assert "renew" in calls[since:], "the lease is not renewed"
        assert not {*REPORTS, "memory", "non_resident"} & set(calls[since:])
        since = len(calls)
        barrier.release()

        async def reported():
            return {*REPORTS, "memory", "non_resident"} <= set(calls[since:])

        await wait_until(reported)
        assert calls.index("append", since) < min(
            calls.index(name, since) for name in {*REPORTS, "memory", "non_resident"}
        )
        await read_job(client, "a")


async def test_after_a_second_of_prefill_the_worker_is_reported_busy(fake):
    client, barrier, model = fake.client(), StepBarrier(at=1), SharedModel.echo()
    loaded = model.fresh(ScriptedRunner(model.runner, barrier.script))
    async with serving(fake, loaded) as worker:
        await client.submit(job_id="a", prompt="x" * 200, max_tokens=2)
        await barrier.wait_until_reached()

        async def busy():
            return (await client.workers())[worker.name]["state"] == "busy"

        began = time.monotonic()
        await wait_until(busy)
        assert time.monotonic() - began < 2
        barrier.release()
        await read_job(client, "a")


async def test_the_last_reports_do_not_wait_for_a_token(fake):
    """The engine hangs before the first token, and the worker still reports why it exits."""
    client, barrier, model = fake.client(), StepBarrier(at=0), SharedModel.echo()
    loaded = model.fresh(ScriptedRunner(model.runner, barrier.script))
    async with serving(fake, loaded, stall_s=0.3) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=2)
        assert await asyncio.wait_for(worker.task, 10) == 2
        barrier.release()
    assert [event.kind for event in await worker_events(fake, "w1")][-2:] == ["error", "stopped"]


async def test_memory_is_reported_at_both_edges_of_a_job(fake):
    client, model = fake.client(), SharedModel.echo()
    loaded = model.fresh(ScriptedRunner(model.runner, lambda step: time.sleep(0.01)))
    async with serving(fake, loaded, vram_s=60) as worker:

        async def reported(count):
            return len([e for e in await worker_events(fake, worker.name) if e.kind == "vram"]) == count

        await wait_until(lambda: reported(1))
        await run_job(client, prompt="abc", max_tokens=30)
        await wait_until(lambda: reported(3))


async def test_the_gate_opens_with_the_token_or_after_a_second():
    gate = FirstTokenGate()
    await asyncio.wait_for(gate.wait_open(), 1)
    gate.close()
    waiting = asyncio.ensure_future(gate.wait_open())
    await asyncio.sleep(0.05)
    assert not waiting.done()
    gate.open()
    gate.close()  # the next job begins at once: a waiter need not wait for two jobs
    await asyncio.wait_for(waiting, 0.5)
    began = time.monotonic()
    await gate.wait_open()
    assert 0.8 < time.monotonic() - began < 3


async def test_on_open_is_called_once_however_the_gate_opens(monkeypatch):
    monkeypatch.setattr("worker.service.reporter._MAX_CLOSED_S", 0.05)
    gate, calls = FirstTokenGate(), []
    gate.close(lambda: calls.append("token"))
    assert calls == []
    gate.open()
    gate.open()
    gate.close(lambda: calls.append("timeout"))
    await wait_until(lambda: asyncio.sleep(0, len(calls) == 2))
    gate.open()
    assert calls == ["token", "timeout"]


async def test_reports_that_the_server_takes_slowly_do_not_pile_up(fake):
    taken, blocked = asyncio.Event(), asyncio.Event()

    async def before(name):
        if name == "add" and taken.is_set():
            blocked.set()
            await released.wait()

    released = asyncio.Event()
    streams = LossyStreams(fake.connect(), lambda name: False, before)
    async with serving(fake, SharedModel.echo().fresh(), streams=streams, vram_s=0.02) as worker:
        client = fake.client()
        await run_job(client, prompt="abc", max_tokens=2)
        taken.set()
        await run_job(client, prompt="abc", max_tokens=2)
        await asyncio.wait_for(blocked.wait(), 60)
        for _ in range(30):
            await run_job(client, prompt="abc", max_tokens=2)
            await asyncio.sleep(0.01)
        waiting = worker.service._reporter._queued.qsize()
        released.set()
    assert waiting <= 1, f"{waiting} reports wait for the server"


async def test_a_report_that_fails_unexpectedly_stops_no_later_one(fake):
    adds, failing = [], True

    async def before(name):
        if name == "add":
            adds.append(name)
            if failing and len(adds) > 4:
                raise RuntimeError("a bug")

    streams = LossyStreams(fake.connect(), lambda name: False, before)
    async with serving(fake, SharedModel.echo().fresh(), streams=streams, vram_s=0.02) as worker:
        async with asyncio.timeout(60):
            while len(adds) < 6:
                await run_job(fake.client(), prompt="abc", max_tokens=2)
            failing, failed = False, len(adds)
            while len(adds) < failed + 3:
                await run_job(fake.client(), prompt="abc", max_tokens=2)
        assert worker.logged("background_fault")
