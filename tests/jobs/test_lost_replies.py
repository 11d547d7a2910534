"""Lost replies and lost writes: a repeated call has the same effect."""

from __future__ import annotations

import asyncio
from itertools import count

import pytest

from tests.jobs.echo import begin, claim_next, complete, take_next, text, tokens
from tests.jobs.harness import (
    LONG_LEASE,
    NO_LEASE,
    SHORT_LEASE,
    Harness,
    LossyStreams,
    assert_consistent,
    lease_settings,
    wait_until,
)
from worker.errors import InvalidRequest, QueueFull
from worker.jobs import streams
from worker.jobs.client import Client
from worker.jobs.keys import events_key, queue_key, state_key
from worker.jobs.lease import Closed, Fenced, Renewal
from worker.jobs.streams import Disconnected


@pytest.mark.parametrize("call", ["take", "append", "settle", "renew", "expire_job", "job_state", "range"])
async def test_a_lost_reply_is_harmless(harness: Harness, call: str) -> None:
    client, dead = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    await dead.append(await take_next(dead), tokens(0, 2))
    turns = count()
    lossy = LossyStreams(harness.connect(), lambda name: name == call and next(turns) % 2 == 0)
    successor = await harness.transport("w2", NO_LEASE, lossy)
    lease = await take_next(successor)
    assert lease.epoch == 2
    assert await successor.renew(lease) is Renewal.HELD
    await complete(successor, lease, 5)
    assert next(turns) > 1
    assert await client.queue() == []
    await assert_consistent(harness, a=text(5))


async def test_a_lost_reply_to_a_first_take_makes_no_second_epoch(harness: Harness) -> None:
    client, turns = harness.client(), count()
    worker = await harness.transport(
        "w1", LONG_LEASE, LossyStreams(harness.connect(), lambda n: n == "take" and next(turns) < 3)
    )
    await client.submit(job_id="a", prompt="hello")
    lease = await take_next(worker)
    assert lease.epoch == 1
    assert (await client.state("a"))["barren"] == "0"
    await complete(worker, lease, 1)
    await assert_consistent(harness, a=text(1))


async def test_after_a_lost_reply_to_a_claim_its_entry_comes_before_new_ones(harness: Harness) -> None:
    client, turns = harness.client(), count()
    worker = await harness.transport(
        "w1", LONG_LEASE, LossyStreams(harness.connect(), lambda n: n == "read_new" and next(turns) == 0)
    )
    for job_id in ("a", "b"):
        await client.submit(job_id=job_id, prompt="hello")
    assert await worker.claim() is None
    first = await take_next(worker)
    assert first.job_id == "a"
    second = await take_next(worker)
    assert second.job_id == "b"


async def test_the_running_job_is_not_claimed_again_after_a_lost_reply(harness: Harness) -> None:
    client, turns = harness.client(), count()
    worker = await harness.transport(
        "w1", LONG_LEASE, LossyStreams(harness.connect(), lambda n: n == "read_new" and next(turns) == 1)
    )
    await client.submit(job_id="a", prompt="hello")
    lease = await take_next(worker)
    assert await worker.claim() is None
    assert await worker.claim() is None
    await complete(worker, lease, 1)


async def test_a_lost_reply_to_a_give_back_is_harmless(harness: Harness) -> None:
    turns = count()
    lossy = LossyStreams(harness.connect(), lambda name: name == "give_back" and next(turns) % 2 == 0)
    client, worker = harness.client(), await harness.transport("w1", LONG_LEASE, lossy)
    await client.submit(job_id="a", prompt="hello")
    await worker.release(await take_next(worker))
    lease = await take_next(await harness.transport("w2"))
    assert (lease.claim.deliveries, lease.history.reason) == (1, "drain")


async def test_a_lost_reply_to_a_cancel_is_harmless(harness: Harness) -> None:
    turns = count()
    client = Client(LossyStreams(harness.connect(), lambda name: name == "cancel" and next(turns) == 1))
    await client.submit(job_id="a", prompt="hello")
    assert await client.cancel("a") == "cancelled"
    assert next(turns) == 3
    worker = await harness.transport("w1")
    assert await begin(worker, await claim_next(worker)) == Closed("over")
    await assert_consistent(harness, a=None)


async def test_a_submission_is_sent_again_once_after_a_lost_reply(harness: Harness) -> None:
    turns, worker = count(), await harness.transport("w1")
    client = Client(LossyStreams(harness.connect(), lambda name: name == "enqueue" and next(turns) == 0))
    job_id = await client.submit(prompt="hello")
    assert [entry.job_id for entry in await client.queue()] == [job_id, job_id]
    await complete(worker, await take_next(worker), 2)
    assert await begin(worker, await claim_next(worker)) in (Closed("duplicate"), Closed("over"))
    assert (await client.result(job_id))[0] == text(2)


async def test_a_submission_whose_first_entry_filled_the_queue_has_succeeded(harness: Harness) -> None:
    turns = count()
    lossy = LossyStreams(harness.connect(), lambda name: name == "enqueue" and next(turns) == 0)
    client = Client(lossy, bound=1)
    await client.submit(job_id="a", prompt="hello")
    assert [entry.job_id for entry in await client.queue()] == ["a"]
    with pytest.raises(QueueFull):
        await client.submit(job_id="b", prompt="hello")


async def test_an_interrupted_submission_reports_its_job_id(harness: Harness) -> None:
    client = Client(LossyStreams(harness.connect(), lambda name: name == "enqueue"))
    with pytest.raises(Disconnected) as caught:
        await client.submit(prompt="hello")
    assert caught.value.job_id in [entry.job_id for entry in await client.queue()]
    known = client.new_id()
    with pytest.raises(Disconnected) as caught:
        await client.submit(job_id=known, prompt="hello")
    assert caught.value.job_id == known


@pytest.mark.parametrize("refusals", [3, 1000])
async def test_a_refused_call_is_repeated_for_a_limited_time(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, refusals: int
) -> None:
    monkeypatch.setattr(streams, "BUSY_S", 1.0)
    calls = 0

    async def refuse(_: str) -> None:
        nonlocal calls
        calls += 1
        if calls <= refusals:
            raise Disconnected("the server is a replica", "READONLY")

    client = Client(LossyStreams(harness.connect(), lambda _: False, refuse))
    if refusals == 3:
        await client.submit(prompt="hello")
        assert calls == 4
        return
    with pytest.raises(Disconnected) as caught:
        await client.submit(prompt="hello")
    assert caught.value.code == "REDIS_BUSY"
    assert calls > 3


async def test_a_lost_reply_to_a_dead_letter_adds_no_second_one(harness: Harness) -> None:
    client, turns = harness.client(), count()
    lossy = LossyStreams(harness.connect(), lambda name: name == "settle" and next(turns) < 2)
    worker = await harness.transport("w1", LONG_LEASE, lossy)
    await harness.connect().enqueue("default", {"p": b"\xc1"}, 10)
    await worker.dead_letter(await claim_next(worker), InvalidRequest("no readable job_id"))
    assert next(turns) == 3
    assert len(await client.dead_letters()) == 1


async def test_after_a_lost_connection_nothing_is_reclaimed_for_one_lease(harness: Harness) -> None:
    client, dead, turns = harness.client(), await harness.transport("w1", SHORT_LEASE), count()
    await client.submit(job_id="a", prompt="hello")
    await take_next(dead)
    lossy = LossyStreams(harness.connect(), lambda name: name == "read_own" and next(turns) == 0)
    successor = await harness.transport("w2", lease_settings(lease_s=0.3, scan_s=0.02), lossy)

    async def lease_has_expired() -> bool:
        return (await harness.connect().pending("default", 1))[0].idle_ms > 300

    await wait_until(lease_has_expired)
    assert await successor.claim() is None
    loop = asyncio.get_running_loop()
    since = loop.time()

    async def taken_over() -> bool:
        return await successor.claim() is not None

    await wait_until(taken_over)
    assert loop.time() - since > 0.25


async def test_the_events_of_a_cancelled_append_are_written_by_the_next(harness: Harness) -> None:
    client = harness.client()
    turns = count()

    def dies(name: str) -> bool:
        if name == "append" and next(turns) == 0:
            raise asyncio.CancelledError
        return False

    worker = await harness.transport("w1", LONG_LEASE, LossyStreams(harness.connect(), dies))
    await client.submit(job_id="a", prompt="hello")
    lease = await take_next(worker)
    with pytest.raises(asyncio.CancelledError):
        await worker.append(lease, tokens(0, 1))
    await worker.append(lease, tokens(1, 2))
    await complete(worker, lease, 2)
    await assert_consistent(harness, a=text(2))


async def test_lost_writes_are_written_again_with_the_same_ids(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lease = await take_next(worker)
    await worker.append(lease, tokens(0, 2))
    restore = await harness.snapshot(events_key("a"), state_key("a"))
    await worker.append(lease, tokens(2, 3))
    await worker.append(lease, tokens(3, 4))
    before = await harness.connect().range(events_key("a"), "-", "+", 10)
    await restore()
    await complete(worker, lease, 5)
    assert (await harness.connect().range(events_key("a"), "-", "+", 10))[:4] == before
    await assert_consistent(harness, a=text(5))


async def test_a_lost_take_is_written_again_unless_another_worker_has_the_epoch(harness: Harness) -> None:
    client, dead = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    await dead.append(await take_next(dead), tokens(0, 2))
    restore = await harness.snapshot(events_key("a"), state_key("a"))
    first = await harness.transport("w2", NO_LEASE)
    lease = await take_next(first)
    await first.append(lease, tokens(2, 3))
    await restore()
    await first.append(lease, tokens(3, 4))
    assert (await client.state("a"))["epoch"] == "2"
    await restore()
    second = await harness.transport("w3", NO_LEASE)
    other = await take_next(second)
    assert other.epoch == lease.epoch == 2
    with pytest.raises(Fenced):
        await first.append(lease, tokens(4, 5))
    await complete(second, other, 5)
    await assert_consistent(harness, a=text(5))


async def test_an_entry_deleted_while_pending_is_acknowledged(harness: Harness) -> None:
    client, turns = harness.client(), count()
    lossy = LossyStreams(harness.connect(), lambda name: name == "read_new" and next(turns) == 0)
    worker = await harness.transport("w1", LONG_LEASE, lossy)
    await client.submit(job_id="a", prompt="hello")
    assert await worker.claim() is None
    (row,) = await client.queue()
    await harness.connect().delete(queue_key("default"), row.entry_id)
    assert await worker.claim() is None
    assert await harness.connect().pending("default", 10) == []


async def test_commands_are_received_after_an_outage(harness: Harness) -> None:
    turns = count()
    lossy = LossyStreams(harness.connect(), lambda name: name == "read" and next(turns) == 0)
    worker = await harness.transport("w1", LONG_LEASE, lossy)
    next_command = asyncio.ensure_future(anext(worker.registration.commands()))
    await harness.client().drain("w1")
    assert (await next_command).target == "w1"
