"""Cancelling a job that is waiting, unknown, running, finished, released, or whose worker died."""

from __future__ import annotations

import asyncio

import pytest

from tests.jobs.echo import begin, claim_next, complete, take_next, text, tokens
from tests.jobs.harness import NO_LEASE, Harness, LossyStreams, assert_consistent
from worker.errors import InvalidRequest
from worker.jobs.client import Client
from worker.jobs.events import ErrorEvent
from worker.jobs.lease import Closed, Renewal


async def test_a_waiting_job_is_cancelled_at_once_and_its_entry_settled_when_claimed(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    assert await client.cancel("a") == "cancelled"
    assert await client.cancel("a") == "cancelled"
    (only,) = [item async for item in client.events("a")]
    assert isinstance(only.event, ErrorEvent)
    assert (only.event.code, only.envelope.epoch, only.envelope.job_id) == ("CANCELLED", 1, "a")
    assert await begin(worker, await claim_next(worker)) == Closed("over")
    assert await client.queue() == []
    await assert_consistent(harness, a=None)


async def test_cancelling_an_unknown_job_reports_it_and_writes_nothing(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    await client.submit(job_id="another", prompt="the id TYPO is no job")
    before = await harness.keys()
    assert await client.cancel("TYPO") == "unknown"
    assert not await client.is_known("TYPO")
    assert await harness.keys() == before
    await complete(worker, await take_next(worker), 1)
    await client.submit(job_id="TYPO", prompt="hello")
    assert await client.is_known("TYPO")
    await complete(worker, await take_next(worker), 1)
    assert await client.cancel("TYPO") == "over"


async def test_a_job_behind_many_others_is_found(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.jobs.queues.SEARCH_PAGE", 3)
    client, other = harness.client(), harness.client()
    for n in range(6):
        await other.submit(job_id=f"j{n}", prompt="j5 j6 j7")
    assert [await client.cancel(job) for job in ("j5", "j0", "j6")] == ["cancelled", "cancelled", "unknown"]


async def test_a_job_that_is_taken_and_ends_during_the_search_is_not_unknown(harness: Harness) -> None:
    worker, ended = await harness.transport("w1"), False

    async def run_it(call: str) -> None:
        nonlocal ended
        if call == "find" and not ended:
            ended = True
            await complete(worker, await take_next(worker), 1)

    client = Client(LossyStreams(harness.connect(), lambda _: False, run_it))
    await harness.client().submit(job_id="a", prompt="hello")
    assert await client.cancel("a") == "over"
    assert ended


async def test_cancelling_a_running_job_sends_a_command_and_sets_a_flag(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lease = await take_next(worker)
    assert await worker.renew(lease) is Renewal.HELD
    next_command = asyncio.ensure_future(anext(worker.registration.commands()))
    assert await client.cancel("a") == "requested"
    assert await client.cancel("a") == "requested"
    command = await next_command
    assert (command.do, command.target) == ("cancel", "a")
    assert await worker.renew(lease) is Renewal.CANCEL_REQUESTED
    await worker.finish(lease, ErrorEvent(code="CANCELLED", message="cancelled by request"))
    await worker.settle(lease)
    assert await client.cancel("a") == "cancelled"
    await assert_consistent(harness, a=None)


async def test_a_finished_job_cannot_be_cancelled(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    await complete(worker, await take_next(worker), 1)
    assert await client.cancel("a") == "over"
    await assert_consistent(harness, a=text(1))
    with pytest.raises(InvalidRequest):
        await client.cancel("not an id")


async def test_a_cancelled_job_of_a_dead_worker_is_ended_by_the_next_worker(harness: Harness) -> None:
    client, dead = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    await dead.append(await take_next(dead), tokens(0, 2))
    assert await client.cancel("a") == "requested"
    successor = await harness.transport("w2", NO_LEASE)
    closed = await begin(successor, await claim_next(successor))
    assert isinstance(closed, Closed)
    assert closed.reason == "cancelled"
    assert await client.queue() == []
    await assert_consistent(harness, a=None)


async def test_a_released_job_is_waiting_and_cancelled_at_once(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lease = await take_next(worker)
    await worker.append(lease, tokens(0, 2))
    await worker.release(lease)
    assert await client.cancel("a") == "cancelled"
    successor = await harness.transport("w2")
    assert await begin(successor, await claim_next(successor)) == Closed("over")
    await assert_consistent(harness, a=None)
