"""Workers die, sleep and wake: who owns a job, who continues it, and who writes nothing any more."""

from __future__ import annotations

from itertools import count

import pytest

from tests.jobs.echo import begin, claimed, complete, end, taken, text, token, tokens
from tests.jobs.worlds import GREEDY, PROMPT, Lossy, World, all_is_well, wait_until
from worker.errors import DeadLettered
from worker.jobs.events import Started
from worker.jobs.keys import events_key
from worker.jobs.lease import Closed, Fenced, Renewal

DAY_MS = 24 * 3600 * 1000


async def test_another_worker_continues_where_a_dead_one_stopped(world: World) -> None:
    client, dead = world.client(), await world.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    await dead.append(await taken(dead), tokens(0, 3))
    heir = await world.transport("w2", GREEDY)
    lease = await taken(heir)
    assert (lease.epoch, lease.history.reason) == (2, "crash")
    assert lease.history.tokens == tuple(token(i) for i in range(3))
    assert isinstance(lease.history.started, Started)
    await complete(heir, lease, 5)
    await all_is_well(world, a=text(5))


async def test_a_paused_worker_woken_after_its_lease_writes_nothing(world: World) -> None:
    client, paused = world.client(), await world.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lease = await taken(paused)
    await paused.append(lease, tokens(0, 2))
    heir = await world.transport("w2", GREEDY)
    successor = await taken(heir)
    with pytest.raises(Fenced):
        await paused.append(lease, tokens(2, 3))
    with pytest.raises(Fenced):
        await paused.finish(lease, end(3))
    assert await paused.renew(lease) is Renewal.LOST
    await paused.release(lease)
    await paused.abandon(lease, DeadLettered("the device is lost"))
    await complete(heir, successor, 4)
    with pytest.raises(Fenced):
        await paused.append(lease, tokens(3, 4))
    assert "last_error" not in await client.state("a")
    await all_is_well(world, a=text(4))


async def test_a_late_claimer_cannot_fence_the_rightful_owner(world: World) -> None:
    client, late, owner = world.client(), await world.transport("w1"), await world.transport("w2", GREEDY)
    await client.submit(job_id="a", prompt="hello")
    old = await claimed(late)
    lease = await taken(owner)
    assert await begin(late, old) == Closed("lost")
    await complete(owner, lease, 2)
    assert await begin(late, old) == Closed("over")
    await all_is_well(world, a=text(2))


async def test_the_rightful_owner_fences_a_late_claimer_that_began_first(world: World) -> None:
    client, late, owner = world.client(), await world.transport("w1"), await world.transport("w2", GREEDY)
    await client.submit(job_id="a", prompt="hello")
    old, new = await claimed(late), await claimed(owner)
    early = await begin(late, old)
    lease = await begin(owner, new)
    assert not isinstance(early, Closed)
    assert not isinstance(lease, Closed)
    with pytest.raises(Fenced):
        await late.append(early, tokens(0, 1))
    await complete(owner, lease, 2)
    await all_is_well(world, a=text(2))


async def test_what_is_published_between_a_look_and_a_take_is_not_lost(world: World) -> None:
    client, slow, takes = world.client(), await world.transport("w1"), count()
    await client.submit(job_id="a", prompt="hello")
    old = await taken(slow)

    async def the_other_still_writes(name: str) -> None:
        if name == "take" and next(takes) == 1:
            await slow.append(old, tokens(0, 1))

    heir = await world.transport("w2", GREEDY, Lossy(world.connect(), lambda _: False, the_other_still_writes))
    lease = await taken(heir)
    assert next(takes) == 3
    assert lease.history.tokens == (token(0),)
    await complete(heir, lease, 2)
    await all_is_well(world, a=text(2))


async def test_death_between_the_terminal_event_and_the_acknowledgement_is_settled_by_another(world: World) -> None:
    client, dead, heir = world.client(), await world.transport("w1"), await world.transport("w2", GREEDY)
    await client.submit(job_id="a", prompt="hello")
    lease = await taken(dead)
    await dead.finish(lease, tokens(0, 2), end(2))
    assert await begin(heir, await claimed(heir)) == Closed("over")
    assert await client.queue() == []
    assert ((await world.keys())[events_key("a")] or 0) <= DAY_MS
    await all_is_well(world, a=text(2))


async def test_a_worker_that_died_is_noticed_within_its_lease_and_a_scan(world: World) -> None:
    client, dead = world.client(), await world.transport("w1", PROMPT)
    await client.submit(job_id="a", prompt="hello")
    await taken(dead)
    heir = await world.transport("w2", PROMPT)
    assert await heir.claim() is None
    found = []

    async def taken_over() -> bool:
        found.append(await heir.claim())
        return found[-1] is not None

    await wait_until(taken_over, timeout_s=1.0)


async def test_a_renewed_lease_is_not_taken_over(world: World) -> None:
    client, owner = world.client(), await world.transport("w1", PROMPT)
    await client.submit(job_id="a", prompt="hello")
    lease = await taken(owner)
    other = await world.transport("w2", PROMPT)
    for _ in range(6):
        assert await owner.renew(lease) is Renewal.HELD
        assert await other.claim() is None
    assert lease.claim.deliveries == (await world.connect().pending("default", 1))[0].deliveries == 1


async def test_a_give_back_counts_as_no_delivery_and_is_found_at_once(world: World) -> None:
    client = world.client()
    await client.submit(job_id="a", prompt="hello")
    for n in range(4):
        worker = await world.transport(f"w{n}")
        lease = await taken(worker)
        assert lease.claim.deliveries == 1
        assert lease.history.handed_back == (n > 0)
        await worker.append(lease, tokens(n, n + 1))
        await worker.release(lease)
    worker = await world.transport("w4")
    await complete(worker, await taken(worker), 4)
    await all_is_well(world, a=text(4))


async def test_a_claim_can_be_given_back_before_it_is_begun(world: World) -> None:
    client, worker = world.client(), await world.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    await worker.release(await claimed(worker))
    other = await world.transport("w2")
    lease = await taken(other)
    assert (lease.epoch, lease.claim.deliveries) == (1, 1)


async def test_a_failing_worker_leaves_its_job_at_once_and_says_why(world: World) -> None:
    client, failing = world.client(), await world.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lease = await taken(failing)
    await failing.append(lease, tokens(0, 1))
    await failing.abandon(lease, DeadLettered("the device is lost"))
    assert (await client.state("a"))["last_error"] == "DEAD_LETTERED"
    heir = await world.transport("w2")
    lease = await taken(heir)
    assert (lease.history.reason, lease.claim.deliveries) == ("crash", 2)
    await complete(heir, lease, 2)
    await all_is_well(world, a=text(2))


async def test_a_job_with_missing_events_ends_with_an_error(world: World) -> None:
    client, dead = world.client(), await world.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    await dead.append(await taken(dead), tokens(0, 2))
    await world.trim(events_key("a"))
    heir = await world.transport("w2", GREEDY)
    closed = await begin(heir, await claimed(heir))
    assert isinstance(closed, Closed)
    assert closed.error is not None
    assert (closed.reason, closed.error.code) == ("refused", "INTERNAL")
    (only,) = [item async for item in client.events("a")]
    assert only.entry_id == "2-0"


async def test_a_consumer_is_deleted_only_when_nothing_is_pending_for_it(world: World) -> None:
    client, streams = world.client(), world.connect()
    await client.submit(job_id="a", prompt="hello")
    holder = await world.transport("w1")
    await claimed(holder)
    assert await streams.remove_consumers("default", "w1", 0) == 0
    heir = await world.transport("w2", GREEDY)
    lease = await taken(heir)
    assert await streams.remove_consumers("default", None, 60_000) == 0
    assert await streams.remove_consumers("default", "w1", 0) == 1
    assert await streams.remove_consumers("default", None, 0) == 0
    await complete(heir, lease, 1)
    assert await streams.remove_consumers("default", None, 0) == 1


async def test_a_new_worker_sweeps_out_consumers_that_nobody_has_seen(world: World) -> None:
    gone = await world.transport("w1")
    await gone.claim()
    assert await world.connect().remove_consumers("default", "w1", 3_600_000) == 0
    await (await world.transport("w2")).claim()
    assert await world.connect().remove_consumers("default", None, 0) == 2
