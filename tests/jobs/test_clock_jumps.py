"""The server's clock jumps: takeovers and the list of workers follow elapsed time."""

from __future__ import annotations

import time

import pytest

from tests.jobs.echo import begin, complete, take_next, text, tokens
from tests.jobs.harness import MemoryHarness, assert_consistent, lease_settings, wait_until
from tests.jobs.memory_streams import MemoryStreams
from worker.jobs.consumer import RenewalWatch
from worker.jobs.lease import Lease, Renewal
from worker.jobs.streams import PendingEntry

HOUR_S = 3600.0
LEASE = lease_settings(lease_s=0.3, scan_s=0.02)


class JumpingHarness(MemoryHarness):
    """A server in memory, `jump_s` seconds ahead of this machine's clock."""

    def __init__(self) -> None:
        super().__init__()
        self.jump_s = 0.0
        self.streams = MemoryStreams(lambda: time.time() + self.jump_s)


async def taken_over_after(harness: JumpingHarness, successor: str) -> float:
    """Seconds until another worker takes the job over and completes it."""
    worker, began = await harness.transport(successor, LEASE), time.monotonic()
    claims = []

    async def claimed() -> bool:
        claims.extend([claim] if (claim := await worker.claim()) else [])
        return bool(claims)

    await wait_until(claimed, timeout_s=2.0)
    seconds = time.monotonic() - began
    lease = await begin(worker, claims[0])
    assert isinstance(lease, Lease)
    await complete(worker, lease, 4)
    return seconds


@pytest.mark.parametrize("jump_s", [-HOUR_S, -1.0, HOUR_S])
async def test_a_dead_worker_s_job_is_taken_over_within_the_lease_and_a_scan(jump_s: float) -> None:
    harness = JumpingHarness()
    client, dead = harness.client(), await harness.transport("w1", LEASE)
    await client.submit(job_id="a", prompt="hello")
    await dead.append(await take_next(dead), tokens(0, 2))
    harness.jump_s = jump_s
    assert await taken_over_after(harness, "w2") < 0.3 + 0.2
    await assert_consistent(harness, a=text(4))


@pytest.mark.parametrize("jump_s", [-HOUR_S, -0.1, HOUR_S])
async def test_a_jump_that_a_scanning_worker_sees_neither_delays_nor_hastens_a_takeover(jump_s: float) -> None:
    harness = JumpingHarness()
    client, owner = harness.client(), await harness.transport("w1", LEASE)
    other = await harness.transport("w2", LEASE)
    await client.submit(job_id="a", prompt="hello")
    lease = await take_next(owner)
    assert await other.claim() is None
    harness.jump_s = jump_s
    for _ in range(20):
        assert await owner.renew(lease) is Renewal.HELD
        assert await other.claim() is None
    renewed = time.monotonic()
    claim = None
    while claim is None:
        claim = await other.claim()
    assert 0.25 < time.monotonic() - renewed < 0.3 + 0.2
    assert claim.deliveries == 2


async def test_a_released_job_is_claimable_at_once_after_a_jump() -> None:
    harness = JumpingHarness()
    client, worker = harness.client(), await harness.transport("w1", LEASE)
    other = await harness.transport("w2", LEASE)
    await client.submit(job_id="a", prompt="hello")
    lease = await take_next(worker)
    assert await other.claim() is None
    harness.jump_s = -HOUR_S
    await worker.release(lease)
    claim = await other.claim() or await other.claim()
    assert claim is not None
    assert claim.deliveries == 1


@pytest.mark.parametrize("jump_s", [-HOUR_S, -20.0, HOUR_S])
async def test_a_dead_worker_is_not_listed_after_a_jump_and_a_live_one_is(jump_s: float) -> None:
    harness = JumpingHarness()
    dead, live = await harness.transport("dead"), await harness.transport("live")
    await dead.registration.heartbeat({"state": "busy"})
    harness.jump_s = jump_s
    await live.registration.heartbeat({"state": "ready"})
    assert set(await harness.client().workers()) == {"live"}


def test_an_entry_that_was_claimed_or_renewed_counts_as_renewed() -> None:
    watch = RenewalWatch()
    old = PendingEntry("1-1", "w1", 5000, 1, 1000)
    assert watch.overdue([old], 4.0) == [old]
    for renewed in (
        PendingEntry("1-1", "w1", 10, 1, 6000),
        PendingEntry("1-1", "w2", 0, 2, 6500),
        PendingEntry("1-1", "w2", 0, 3, 6500),
    ):
        assert watch.overdue([renewed], 4.0) == []
    assert watch.overdue([old], 4.0) == [old]
    assert watch.overdue([], 4.0) == []
