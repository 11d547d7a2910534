"""Renewals of several leases in one round trip."""

from __future__ import annotations

import asyncio

from tests.jobs.echo import take_next, tokens
from tests.jobs.harness import NO_LEASE, Harness, LossyStreams, RedisHarness
from worker.jobs.keys import queue_key, state_key
from worker.jobs.lease import Lease, Renewal
from worker.jobs.transport import Transport


async def take_some(harness: Harness, worker: Transport, names: str) -> dict[str, Lease]:
    for name in names:
        await harness.client().submit(job_id=name, prompt="hello")
    leases = [await take_next(worker) for _ in names]
    return {lease.job_id: lease for lease in leases}


async def test_each_lease_and_claim_has_its_own_result(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    leases = await take_some(harness, worker, "abcd")
    successor = await harness.transport("w2", NO_LEASE)
    stolen = await take_next(successor)
    left = [lease for job_id, lease in leases.items() if job_id != stolen.job_id]
    await client.cancel(left[0].job_id)
    await harness.connect().delete(queue_key("default"), left[1].claim.entry_id)
    held = [leases[stolen.job_id], *left, left[2].claim]
    for _ in range(2):  # the first call may find a server without the scripts
        renewals = await worker.renew_many(held)
        for each in held if None in renewals else ():
            await worker.renew(each)
    assert renewals == [
        Renewal.LOST,
        Renewal.CANCEL_REQUESTED,
        Renewal.DELETED,
        Renewal.HELD,
        Renewal.HELD,
    ]


async def test_renewed_leases_are_not_reclaimed(harness: Harness) -> None:
    short = NO_LEASE.model_copy(update={"lease_s": 0.3})
    worker = await harness.transport("w1")
    leases = [*(await take_some(harness, worker, "ab")).values()]
    for lease in leases:
        await worker.renew(lease)
    other = await harness.transport("w2", short)
    for _ in range(8):
        await asyncio.sleep(0.1)
        assert await worker.renew_many(leases) == [Renewal.HELD] * 2
        assert await other.claim() is None


async def test_a_lost_reply_and_a_failed_call_are_left_to_single_renewals(harness: Harness) -> None:
    lossy = LossyStreams(harness.connect(), lambda name: name == "renew_many")
    worker = await harness.transport("w1", streams=lossy)
    leases = [*(await take_some(harness, worker, "ab")).values()]
    assert await worker.renew_many(leases) == [None, None]
    assert [await worker.renew(lease) for lease in leases] == [Renewal.HELD] * 2


async def test_a_key_of_another_type_affects_its_own_lease_only(harness: Harness) -> None:
    if not isinstance(harness, RedisHarness):
        return
    worker = await harness.transport("w1")
    leases = await take_some(harness, worker, "ab")
    for lease in leases.values():
        await worker.append(lease, tokens(0, 1))
        await worker.renew(lease)
    await harness.drop(state_key("a"))
    await harness.raw.set(state_key("a"), "text")
    assert await worker.renew_many([leases["a"], leases["b"]]) == [None, Renewal.HELD]
