"""Workers die, pause and wake: who owns a job, who continues it, and who is fenced."""

from __future__ import annotations

from itertools import count

import pytest

from tests.jobs.echo import begin, claim_next, complete, end, take_next, text, token, tokens
from tests.jobs.harness import (
    NO_LEASE,
    SHORT_LEASE,
    FakeRedisHarness,
    Harness,
    LossyStreams,
    RedisHarness,
    ServerHarness,
    assert_consistent,
    wait_until,
)
from tests.jobs.servers import Server
from worker.errors import DeadLettered
from worker.jobs.events import Started
from worker.jobs.keys import GROUP, events_key, queue_key
from worker.jobs.lease import Closed, Fenced, Renewal

DAY_MS = 24 * 3600 * 1000


async def test_another_worker_continues_where_a_dead_one_stopped(harness: Harness) -> None:
    client, dead = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    await dead.append(await take_next(dead), tokens(0, 3))
    successor = await harness.transport("w2", NO_LEASE)
    lease = await take_next(successor)
    assert (lease.epoch, lease.history.reason) == (2, "crash")
    assert lease.history.tokens == tuple(token(i) for i in range(3))
    assert isinstance(lease.history.started, Started)
    await complete(successor, lease, 5)
    await assert_consistent(harness, a=text(5))


async def test_a_paused_worker_woken_after_its_lease_writes_nothing(harness: Harness) -> None:
    client, paused = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lease = await take_next(paused)
    await paused.append(lease, tokens(0, 2))
    successor = await harness.transport("w2", NO_LEASE)
    new_lease = await take_next(successor)
    with pytest.raises(Fenced):
        await paused.append(lease, tokens(2, 3))
    with pytest.raises(Fenced):
        await paused.finish(lease, end(3))
    assert await paused.renew(lease) is Renewal.LOST
    await paused.release(lease)
    await paused.abandon(lease, DeadLettered("the device is lost"))
    await complete(successor, new_lease, 4)
    with pytest.raises(Fenced):
        await paused.append(lease, tokens(3, 4))
    assert "last_error" not in await client.state("a")
    await assert_consistent(harness, a=text(4))


async def test_a_late_claimer_cannot_fence_the_owner(harness: Harness) -> None:
    client, late, owner = harness.client(), await harness.transport("w1"), await harness.transport("w2", NO_LEASE)
    await client.submit(job_id="a", prompt="hello")
    old = await claim_next(late)
    lease = await take_next(owner)
    assert await begin(late, old) == Closed("lost")
    await complete(owner, lease, 2)
    assert await begin(late, old) == Closed("over")
    await assert_consistent(harness, a=text(2))


async def test_the_owner_fences_a_late_claimer_that_began_first(harness: Harness) -> None:
    client, late, owner = harness.client(), await harness.transport("w1"), await harness.transport("w2", NO_LEASE)
    await client.submit(job_id="a", prompt="hello")
    old, new = await claim_next(late), await claim_next(owner)
    early = await begin(late, old)
    lease = await begin(owner, new)
    assert not isinstance(early, Closed)
    assert not isinstance(lease, Closed)
    with pytest.raises(Fenced):
        await late.append(early, tokens(0, 1))
    await complete(owner, lease, 2)
    await assert_consistent(harness, a=text(2))


async def test_tokens_published_between_reading_a_job_and_taking_it_are_kept(harness: Harness) -> None:
    client, slow, takes = harness.client(), await harness.transport("w1"), count()
    await client.submit(job_id="a", prompt="hello")
    old = await take_next(slow)

    async def other_worker_writes(name: str) -> None:
        if name == "take" and next(takes) == 1:
            await slow.append(old, tokens(0, 1))

    successor = await harness.transport(
        "w2", NO_LEASE, LossyStreams(harness.connect(), lambda _: False, other_worker_writes)
    )
    lease = await take_next(successor)
    assert next(takes) == 3
    assert lease.history.tokens == (token(0),)
    await complete(successor, lease, 2)
    await assert_consistent(harness, a=text(2))


async def test_a_finished_job_of_a_crashed_worker_is_settled_by_another(harness: Harness) -> None:
    client, dead, successor = harness.client(), await harness.transport("w1"), await harness.transport("w2", NO_LEASE)
    await client.submit(job_id="a", prompt="hello")
    lease = await take_next(dead)
    await dead.finish(lease, tokens(0, 2), end(2))
    assert await begin(successor, await claim_next(successor)) == Closed("over")
    assert await client.queue() == []
    assert ((await harness.keys())[events_key("a")] or 0) <= DAY_MS
    await assert_consistent(harness, a=text(2))


async def test_a_dead_worker_s_job_is_reclaimed_within_lease_and_scan(harness: Harness) -> None:
    client, dead = harness.client(), await harness.transport("w1", SHORT_LEASE)
    await client.submit(job_id="a", prompt="hello")
    await take_next(dead)
    successor = await harness.transport("w2", SHORT_LEASE)
    assert await successor.claim() is None
    found = []

    async def is_reclaimed() -> bool:
        found.append(await successor.claim())
        return found[-1] is not None

    await wait_until(is_reclaimed, timeout_s=1.0)


async def test_a_renewed_lease_is_not_reclaimed(harness: Harness) -> None:
    client, owner = harness.client(), await harness.transport("w1", SHORT_LEASE)
    await client.submit(job_id="a", prompt="hello")
    lease = await take_next(owner)
    other = await harness.transport("w2", SHORT_LEASE)
    for _ in range(6):
        assert await owner.renew(lease) is Renewal.HELD
        assert await other.claim() is None
    assert lease.claim.deliveries == (await harness.connect().pending("default", 1))[0].deliveries == 1


async def test_a_running_entry_that_an_operator_acknowledges_is_pending_again_after_a_renewal() -> None:
    harness = FakeRedisHarness()
    await _acknowledged_by_others(harness)


async def test_a_running_entry_whose_consumer_is_deleted_is_pending_again_after_a_renewal(server: Server) -> None:
    await _acknowledged_by_others(ServerHarness(server.url), delete_consumer=True)
    server.flush()
    await _acknowledged_by_others(ServerHarness(server.url))


async def _acknowledged_by_others(harness: RedisHarness, *, delete_consumer: bool = False) -> None:
    client, owner = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lease = await take_next(owner)
    if delete_consumer:
        await harness.raw.xgroup_delconsumer(queue_key("default"), GROUP, "w1")
    else:
        await harness.raw.xack(queue_key("default"), GROUP, lease.claim.entry_id)
    assert await harness.connect().pending("default", 1) == []
    assert await owner.renew(lease) is Renewal.HELD
    assert [row.consumer for row in await harness.connect().pending("default", 1)] == ["w1"]
    await complete(owner, lease, 3)
    assert await client.queue() == []
    await assert_consistent(harness, a=text(3))
    await harness.close()


async def test_a_released_job_is_claimable_at_once_and_counts_no_delivery(harness: Harness) -> None:
    client = harness.client()
    await client.submit(job_id="a", prompt="hello")
    for n in range(4):
        worker = await harness.transport(f"w{n}")
        lease = await take_next(worker)
        assert lease.claim.deliveries == 1
        assert lease.history.reason == ("drain" if n > 0 else "crash")
        await worker.append(lease, tokens(n, n + 1))
        await worker.release(lease)
    worker = await harness.transport("w4")
    await complete(worker, await take_next(worker), 4)
    await assert_consistent(harness, a=text(4))


async def test_a_claim_can_be_released_before_it_is_taken(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    await worker.release(await claim_next(worker))
    other = await harness.transport("w2")
    lease = await take_next(other)
    assert (lease.epoch, lease.claim.deliveries) == (1, 1)


async def test_an_abandoned_job_is_claimable_at_once_with_a_last_error(harness: Harness) -> None:
    client, failing = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lease = await take_next(failing)
    await failing.append(lease, tokens(0, 1))
    await failing.abandon(lease, DeadLettered("the device is lost"))
    assert (await client.state("a"))["last_error"] == "DEAD_LETTERED"
    successor = await harness.transport("w2")
    lease = await take_next(successor)
    assert (lease.history.reason, lease.claim.deliveries) == ("crash", 2)
    await complete(successor, lease, 2)
    await assert_consistent(harness, a=text(2))


async def test_a_job_with_missing_events_ends_with_an_error(harness: Harness) -> None:
    client, dead = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    await dead.append(await take_next(dead), tokens(0, 2))
    await harness.trim(events_key("a"))
    successor = await harness.transport("w2", NO_LEASE)
    closed = await begin(successor, await claim_next(successor))
    assert isinstance(closed, Closed)
    assert closed.error is not None
    assert (closed.reason, closed.error.code) == ("refused", "INTERNAL")
    (only,) = [item async for item in client.events("a")]
    assert only.entry_id == "2-0"


async def test_a_consumer_is_deleted_only_when_nothing_is_pending_for_it(harness: Harness) -> None:
    client, streams = harness.client(), harness.connect()
    await client.submit(job_id="a", prompt="hello")
    holder = await harness.transport("w1")
    await claim_next(holder)
    assert await streams.remove_consumers("default", "w1", 0) == 0
    successor = await harness.transport("w2", NO_LEASE)
    lease = await take_next(successor)
    assert await streams.remove_consumers("default", None, 60_000) == 0
    assert await streams.remove_consumers("default", "w1", 0) == 1
    assert await streams.remove_consumers("default", None, 0) == 0
    await complete(successor, lease, 1)
    assert await streams.remove_consumers("default", None, 0) == 1


async def test_a_new_worker_deletes_dead_consumers(harness: Harness) -> None:
    gone = await harness.transport("w1")
    await gone.claim()
    assert await harness.connect().remove_consumers("default", "w1", 3_600_000) == 0
    await (await harness.transport("w2")).claim()
    assert await harness.connect().remove_consumers("default", None, 0) == 2
