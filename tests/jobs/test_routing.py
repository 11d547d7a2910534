"""`submit(model=...)`: the queue of a living worker of that model."""

from __future__ import annotations

import asyncio

import pytest

from tests.jobs.echo import complete, take_next, text
from tests.jobs.harness import LONG_LEASE, Harness
from worker.jobs import queues
from worker.jobs.keys import queue_key
from worker.jobs.transport import Transport


@pytest.fixture(autouse=True)
def _read_workers_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "SERVED_S", 0.0)


async def live(harness: Harness, name: str, model: str, queue: str, state: str = "ready") -> None:
    worker = await harness.transport(name)
    await worker.registration.heartbeat({"state": state, "model": model, "queue": queue})


async def lengths(harness: Harness, *queues: str) -> list[int]:
    streams = harness.connect()
    return [await streams.length(queue_key(queue)) for queue in queues]


async def test_a_job_goes_to_a_queue_whose_workers_serve_its_model(harness: Harness) -> None:
    client = harness.client()
    await live(harness, "w1", "llama", "default")
    await live(harness, "w2", "qwen", "small")
    for number in (3, 4):
        await live(harness, f"w{number}", "qwen", "large")
    await client.submit(prompt="x", model="llama")
    await client.submit(prompt="x", model="qwen")
    await client.submit(prompt="x")
    assert await lengths(harness, "default", "small", "large") == [2, 0, 1]


@pytest.mark.parametrize("state", ["starting", "draining", "failed"])
async def test_without_a_living_worker_of_the_model_it_goes_to_the_client_s_queue(harness: Harness, state: str) -> None:
    await live(harness, "w1", "qwen", "other", state)
    await harness.client().submit(prompt="x", model="qwen")
    assert await lengths(harness, "default", "other") == [1, 0]


async def test_the_client_s_queue_is_preferred(harness: Harness) -> None:
    for number, queue in enumerate(("other", "other", "default")):
        await live(harness, f"w{number}", "qwen", queue, "busy")
    await harness.client().submit(prompt="x", model="qwen")
    assert await lengths(harness, "default", "other") == [1, 0]


async def test_a_routed_job_is_read_and_cancelled_like_any_other(harness: Harness) -> None:
    client = harness.client()
    await live(harness, "w1", "echo", "other")
    for job_id in ("a", "b"):
        await client.submit(job_id=job_id, prompt="x", model="echo")
    worker = Transport(harness.connect(), "w1", ["other"], LONG_LEASE)
    await worker.open()
    reading = asyncio.ensure_future(client.result("a"))
    await complete(worker, await take_next(worker), 2)
    assert (await reading)[0] == text(2)
    assert await harness.client().is_known("b"), "found in the queue of a living worker"
    await worker.registration.close()
    assert await client.cancel("b") == "cancelled"


async def test_the_workers_are_read_once_for_many_submissions(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queues, "SERVED_S", 60.0)
    client = harness.client()
    await live(harness, "w1", "qwen", "other")
    await asyncio.gather(*(client.submit(prompt="x", model="qwen") for _ in range(20)))
    await live(harness, "w2", "late", "elsewhere")
    await client.submit(prompt="x", model="late")
    assert await lengths(harness, "default", "other", "elsewhere") == [1, 20, 0]
