"""A server loses the delivery of an entry, the start or the end of a job, while its worker lives.

A worker that runs several jobs may receive the entry again beside its own attempt at it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from redis.exceptions import ConnectionError

from tests.jobs.echo import begin, claim_next, complete, end, take_next, text, tokens
from tests.jobs.harness import (
    LONG_LEASE,
    NO_LEASE,
    Harness,
    LossyStreams,
    ServerHarness,
    assert_consistent,
    lease_settings,
    wait_until,
)
from tests.jobs.servers import Server
from worker.errors import Internal, InvalidRequest
from worker.jobs.keys import events_key, queue_key, state_key
from worker.jobs.lease import Claim, Closed, Fenced, Renewal
from worker.jobs.redis_streams import RedisStreams
from worker.jobs.streams import Disconnected

JOB_KEYS = (events_key("a"), state_key("a"))
ALL_KEYS = (queue_key("default"), *JOB_KEYS)


async def test_of_two_attempts_of_one_worker_in_one_epoch_the_later_one_writes(harness: Harness) -> None:
    """The job has two entries, and the server has lost the first attempt's start."""
    client, worker = harness.client(), await harness.transport("w1")
    for _ in range(2):
        await client.submit(job_id="a", prompt="hello")
    first, second = await claim_next(worker), await claim_next(worker)
    lose_start = await harness.snapshot(*JOB_KEYS)
    lost = await begin(worker, first)
    await worker.append(lost, tokens(0, 3))
    await lose_start()
    lease = await begin(worker, second)
    assert (lost.epoch, lease.epoch) == (1, 1)
    await worker.append(lease, tokens(0, 2))
    for write in (worker.append(lost, tokens(3, 4)), worker.finish(lost, end(4))):
        with pytest.raises(Fenced):
            await write
    assert await worker.append_staged([lost]) == [False]
    await complete(worker, lease, 5)
    assert await begin(worker, first) == Closed("over")
    await assert_consistent(harness, a=text(5))


async def test_an_attempt_whose_start_was_lost_after_another_epoch_keeps_its_epoch(harness: Harness) -> None:
    client, dead, worker = harness.client(), await harness.transport("w1"), await harness.transport("w2", NO_LEASE)
    await client.submit(job_id="a", prompt="hello")
    await dead.append(await take_next(dead), tokens(0, 2))
    lose_start = await harness.snapshot(*JOB_KEYS)
    lease = await take_next(worker)
    await worker.append(lease, tokens(2, 3))
    await lose_start()
    await worker.append(lease, tokens(3, 4))
    await worker.append(lease, tokens(4, 5))
    assert lease.epoch == 2
    await complete(worker, lease, 6)
    await assert_consistent(harness, a=text(6))


async def test_an_entry_that_is_delivered_again_is_not_claimed_beside_its_attempt(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lose_delivery = await harness.snapshot(*ALL_KEYS)
    lost = await take_next(worker)
    await worker.append(lost, tokens(0, 3))
    await lose_delivery()
    assert await worker.renew(lost) is Renewal.LOST
    assert await worker.claim() is None
    assert await worker.renew(lost) is Renewal.HELD, "the entry was delivered to this worker"
    with pytest.raises(Fenced):
        await worker.append(lost, tokens(3, 4))
    await worker.release(lost.claim)
    assert await worker.claim() is None, "the attempt has not ended"
    worker.forget(lost.claim)
    successor = await harness.transport("w2", LONG_LEASE)
    await complete(successor, await take_next(successor), 5)
    await assert_consistent(harness, a=text(5))


@pytest.mark.parametrize("last", ["attempt", "settlement"])
async def test_an_entry_is_held_until_its_attempt_and_its_settlement_have_ended(harness: Harness, last: str) -> None:
    """An attempt may end long after its settlement: it waits for a renewal in flight."""
    settling = asyncio.Event()

    async def before(name: str) -> None:
        if name == "expire_job":
            await settling.wait()

    streams = LossyStreams(harness.connect(), lambda _: False, before)
    client, worker = harness.client(), await harness.transport("w1", LONG_LEASE, streams)
    await client.submit(job_id="a", prompt="hello")
    lease = await take_next(worker)
    lose_end = await harness.snapshot(*ALL_KEYS)
    await worker.finish(lease, end(0))
    worker.begin_settling(lease)

    async def is_settled() -> bool:
        return not await client.queue()

    await wait_until(is_settled)
    await lose_end()

    async def claim_again() -> Claim | None:
        worker._consumers["default"].reply_lost()
        return await worker.claim()

    async def end_settlement() -> None:
        settling.set()
        await asyncio.wait(worker._settling)

    if last == "attempt":
        await end_settlement()
    else:
        worker.forget(lease.claim)
    assert await claim_again() is None
    if last == "attempt":
        worker.forget(lease.claim)
    else:
        await end_settlement()
    assert await claim_again() == lease.claim


async def test_an_entry_of_several_queues_is_not_claimed_beside_its_attempt(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lose_delivery = await harness.snapshot(*ALL_KEYS)
    lost = await take_next(worker)
    await lose_delivery()
    consumers = worker._consumers
    assert await consumers._wait(["default"]) is None
    worker.forget(lost.claim)
    await lose_delivery()
    assert await consumers._wait(["default"]) is not None


async def test_a_finished_job_is_published_again_before_its_entry_is_settled(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lease = await take_next(worker)
    await worker.append(lease, tokens(0, 2))
    lose_end = await harness.snapshot(*JOB_KEYS)
    await worker.finish(lease, tokens(2, 4), end(4))
    await lose_end()
    await worker.settle(lease)
    assert (await client.result("a"))[0] == text(4)
    assert await client.queue() == []
    await assert_consistent(harness, a=text(4))


async def test_the_entry_of_a_job_whose_attempt_was_lost_stays_for_another_attempt(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    claim = await claim_next(worker)
    lose_attempt = await harness.snapshot(*JOB_KEYS)
    lease = await begin(worker, claim)
    await worker.finish(lease, tokens(0, 4), end(4))
    await lose_attempt()
    with pytest.raises(Fenced):
        await worker.settle(lease)
    successor = await harness.transport("w2", LONG_LEASE)
    await complete(successor, await take_next(successor), 4)
    await assert_consistent(harness, a=text(4))


def before_settling(restore: Callable[[], Awaitable[None]], disconnect: bool) -> Callable[[str], Awaitable[None]]:
    """Lose writes once, before the first `settle`; with a failed call or with a silent reconnection."""
    lost = False

    async def before(name: str) -> None:
        nonlocal lost
        if name == "settle" and not lost:
            lost = True
            await restore()
            if disconnect:
                raise Disconnected("connection closed by server")

    return before


@pytest.mark.parametrize("disconnect", [True, False])
async def test_a_job_whose_end_is_lost_while_its_entry_is_settled_continues(harness: Harness, disconnect: bool) -> None:
    """`take` found the job over: this worker does not have its events."""
    client, first = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    ended = await take_next(first)
    await first.append(ended, tokens(0, 2))
    lose_end = await harness.snapshot(*JOB_KEYS)
    await first.finish(ended, tokens(2, 4), end(4))
    lossy = LossyStreams(harness.connect(), lambda _: False, before_settling(lose_end, disconnect))
    second = await harness.transport("w2", NO_LEASE, lossy)
    lease = await take_next(second)
    assert (lease.epoch, len(lease.history.tokens)) == (2, 2)
    await complete(second, lease, 4)
    await assert_consistent(harness, a=text(4))


async def test_a_payload_without_a_job_is_dead_lettered_once_if_its_delivery_is_lost(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    await harness.connect().enqueue("default", {"p": b"\xc1"}, 10)
    lose_delivery = await harness.snapshot(queue_key("default"))
    claim = await claim_next(worker)
    await lose_delivery()
    await worker.dead_letter(claim, InvalidRequest("no readable job_id"))
    assert [letter.payload for letter in await client.dead_letters()] == []
    worker.forget(claim)
    await worker.dead_letter(await claim_next(worker), InvalidRequest("no readable job_id"))
    assert [letter.payload for letter in await client.dead_letters()] == [b"\xc1"]
    assert await client.queue() == []


async def test_failed_attempts_of_one_worker_count_even_without_another_worker(harness: Harness) -> None:
    settings = lease_settings(lease_s=0.0, scan_s=0.0, max_attempts=3)
    client, worker = harness.client(), await harness.transport("w1", settings)
    await client.submit(job_id="a", prompt="hello")
    for epoch in (1, 2, 3):
        lease = await take_next(worker)
        assert lease.epoch == epoch
        await worker.abandon(lease, Internal("a fault"))
        worker.forget(lease.claim)
    closed = await begin(worker, await claim_next(worker))
    assert isinstance(closed, Closed)
    assert closed.reason == "dead_lettered"


async def test_an_entry_is_settled_on_the_connection_on_which_its_job_was_found_over(server: Server) -> None:
    """Another connection may be to a server that has restarted and lost the job's end."""
    harness = ServerHarness(server.url)
    client, worker = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lease = await take_next(worker)
    await worker.finish(lease, end(0))
    streams = worker._streams
    assert isinstance(streams, RedisStreams)
    with pytest.raises(ConnectionError):  # noqa: PT012
        async with streams._server.session() as session:
            await streams._run_script("state", JOB_KEYS, (), session)
            await harness.raw.client_kill_filter(_type="normal", skipme=True)
            await streams._run_script("settle", [queue_key("default")], ("workers", lease.claim.entry_id), session)
    assert [entry.job_id for entry in await client.queue()] == ["a"]
    await harness.raw.script_flush()
    await worker.settle(lease)
    assert await client.queue() == []
    await harness.close()
