"""While a job waits for its first token a worker neither talks about itself nor asks its device anything."""

from __future__ import annotations

import asyncio
import time

from tests.jobs.harness import LossyStreams, wait_until
from tests.service.serving import FixedDevice, Gate, Model, Scripted, ask, own_events, serving, story
from worker.backend import MemoryUse
from worker.service.quiet import Quiet

TALK = {"add", "put_status"}


class Asked(FixedDevice):
    """A device that notes what it is asked."""

    def __init__(self, notes):
        super().__init__(MemoryUse(weights=1))
        self._notes = notes

    def memory(self):
        self._notes.append("memory")
        return super().memory()

    def non_resident(self):
        self._notes.append("non_resident")
        return super().non_resident()


def noted(harness, notes):
    async def before(name):
        notes.append(name)

    return LossyStreams(harness.connect(), lambda name: False, before)


async def test_a_workers_talk_waits_for_the_first_token_and_comes_then(fake):
    client, gate, model, notes = fake.client(), Gate(at=0), Model.echo(), []
    served = model.fresh(Scripted(model.runner, gate.script), device=Asked(notes))
    section = {"vram_s": 0.05, "heartbeat_s": 0.3, "residency_s": 0.05}
    async with serving(fake, served, streams=noted(fake, notes), **section) as worker:
        await asyncio.sleep(0.4)  # a heartbeat was long enough ago for the next to come at once
        await client.submit(job_id="a", prompt="abc", max_tokens=500)
        await gate.until_reached()
        worker.service._reporter.load_progress(1, 1)
        since = len(notes)
        await asyncio.sleep(0.3)
        assert "renew" in notes[since:], "what keeps the job goes on"
        assert not {*TALK, "memory", "non_resident"} & set(notes[since:])
        since = len(notes)
        gate.open()

        async def told():
            return {*TALK, "memory", "non_resident"} <= set(notes[since:])

        await wait_until(told)
        assert notes.index("append", since) < min(
            notes.index(name, since) for name in {*TALK, "memory", "non_resident"}
        )
        await story(client, "a")


async def test_after_a_second_of_prefill_an_operator_sees_a_busy_worker(fake):
    client, gate, model = fake.client(), Gate(at=1), Model.echo()
    served = model.fresh(Scripted(model.runner, gate.script))
    async with serving(fake, served) as worker:
        await client.submit(job_id="a", prompt="x" * 200, max_tokens=2)
        await gate.until_reached()

        async def busy():
            return (await client.workers())[worker.name]["state"] == "busy"

        began = time.monotonic()
        await wait_until(busy)
        assert time.monotonic() - began < 2
        gate.open()
        await story(client, "a")


async def test_the_last_words_do_not_wait_for_a_token(fake):
    """An engine that hangs before it: the job has none, and its worker still says why it ends."""
    client, gate, model = fake.client(), Gate(at=0), Model.echo()
    served = model.fresh(Scripted(model.runner, gate.script))
    async with serving(fake, served, stall_s=0.3) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=2)
        assert await asyncio.wait_for(worker.task, 10) == 2
        gate.open()
    assert [event.kind for event in await own_events(fake, "w1")][-2:] == ["error", "stopped"]


async def test_memory_is_told_of_at_both_edges_of_a_job(fake):
    client, model = fake.client(), Model.echo()
    served = model.fresh(Scripted(model.runner, lambda step: time.sleep(0.01)))
    async with serving(fake, served, vram_s=60) as worker:

        async def told(count):
            return len([e for e in await own_events(fake, worker.name) if e.kind == "vram"]) == count

        await wait_until(lambda: told(1))
        await ask(client, prompt="abc", max_tokens=30)
        await wait_until(lambda: told(3))


async def test_quiet_is_over_with_the_token_or_after_a_second_and_without_a_job():
    quiet = Quiet()
    await asyncio.wait_for(quiet.over(), 1)
    quiet.begin()
    waiting = asyncio.ensure_future(quiet.over())
    await asyncio.sleep(0.05)
    assert not waiting.done()
    quiet.end()
    quiet.begin()  # the next job comes at once: who has waited for one need not wait for two
    await asyncio.wait_for(waiting, 0.5)
    began = time.monotonic()
    await quiet.over()
    assert 0.8 < time.monotonic() - began < 3


async def test_what_is_to_follow_follows_once_however_quiet_ends(monkeypatch):
    monkeypatch.setattr("worker.service.quiet._LONGEST_S", 0.05)
    quiet, told = Quiet(), []
    quiet.begin(lambda: told.append("a token came"))
    assert told == []
    quiet.end()
    quiet.end()
    quiet.begin(lambda: told.append("it took too long"))
    await wait_until(lambda: asyncio.sleep(0, len(told) == 2))
    quiet.end()
    assert told == ["a token came", "it took too long"]
