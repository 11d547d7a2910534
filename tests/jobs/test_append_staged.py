"""Events of several jobs of one worker, written in one round trip."""

from __future__ import annotations

import pytest

from tests.jobs.echo import complete, take_next, text, tokens
from tests.jobs.harness import (
    NO_LEASE,
    Harness,
    LossyStreams,
    RedisHarness,
    assert_consistent,
)
from worker.jobs.client import Client
from worker.jobs.keys import events_key
from worker.jobs.lease import Fenced, Lease
from worker.jobs.transport import Transport


async def take_three(client: Client, worker: Transport) -> list[Lease]:
    for name in "abc":
        await client.submit(job_id=name, prompt="hello")
    return [await take_next(worker) for _ in range(3)]


def stage(worker: Transport, leases: list[Lease], first: int, last: int) -> None:
    for lease in leases:
        worker.stage(lease, [tokens(first, last)])


async def test_the_events_of_each_lease_are_written(harness: Harness) -> None:
    worker = await harness.transport("w1")
    leases = await take_three(harness.client(), worker)
    for first in (0, 2):
        stage(worker, leases, first, first + 2)
        await worker.append_staged(leases)  # the first call may find a server without the script
        for lease in leases:
            await worker.append(lease)
    stage(worker, leases, 4, 5)
    assert await worker.append_staged(leases) == [True] * 3
    for lease in leases:
        assert lease.unwritten() == []
        await complete(worker, lease, 6)
    await assert_consistent(harness, a=text(6), b=text(6), c=text(6))


async def test_only_the_lease_that_another_worker_took_over_is_fenced(harness: Harness) -> None:
    client, paused = harness.client(), await harness.transport("w1")
    leases = await take_three(client, paused)
    for lease in leases:
        await paused.append(lease, tokens(0, 1))
    successor = await harness.transport("w2", NO_LEASE)
    taken_over = await take_next(successor)
    (old,) = [lease for lease in leases if lease.job_id == taken_over.job_id]
    stage(paused, leases, 1, 3)
    assert await paused.append_staged(leases) == [lease is not old for lease in leases]
    with pytest.raises(Fenced):
        await paused.append(old)
    await complete(successor, taken_over, 4)
    for lease in leases:
        if lease is not old:
            await complete(paused, lease, 4)
    await assert_consistent(harness, a=text(4), b=text(4), c=text(4))


async def test_a_lost_reply_is_repeated_by_append(harness: Harness) -> None:
    lossy = LossyStreams(harness.connect(), lambda name: name == "append_many")
    worker = await harness.transport("w1", streams=lossy)
    leases = await take_three(harness.client(), worker)
    stage(worker, leases, 0, 2)
    assert await worker.append_staged(leases) == [False] * 3
    for lease in leases:
        await worker.append(lease)
        await complete(worker, lease, 3)
    await assert_consistent(harness, a=text(3), b=text(3), c=text(3))


async def test_a_write_that_the_server_lost_is_repeated_by_append(harness: Harness) -> None:
    worker = await harness.transport("w1")
    leases = await take_three(harness.client(), worker)
    restore = await harness.snapshot(events_key("b"))
    for lease in leases:
        await worker.append(lease, tokens(0, 2))
    await restore()
    stage(worker, leases, 2, 3)
    assert await worker.append_staged(leases) == [lease.job_id != "b" for lease in leases]
    for lease in leases:
        await worker.append(lease)
        await complete(worker, lease, 4)
    await assert_consistent(harness, a=text(4), b=text(4), c=text(4))


async def test_a_key_of_another_type_affects_its_own_job_only(harness: Harness) -> None:
    if not isinstance(harness, RedisHarness):
        return
    worker = await harness.transport("w1")
    leases = await take_three(harness.client(), worker)
    for lease in leases:
        await worker.append(lease, tokens(0, 1))
    await harness.drop(events_key("b"))
    await harness.raw.set(events_key("b"), "text")
    stage(worker, leases, 1, 2)
    assert await worker.append_staged(leases) == [lease.job_id != "b" for lease in leases]


async def test_a_lease_without_staged_events_is_not_written(harness: Harness) -> None:
    """Its job may have ended: the state must not become `running` again."""
    client, worker = harness.client(), await harness.transport("w1")
    leases = await take_three(client, worker)
    for lease in leases:
        await worker.append(lease, tokens(0, 2))
    await complete(worker, leases[0], 3)
    stage(worker, leases[1:], 2, 3)
    assert await worker.append_staged(leases) == [True] * 3
    assert [(await client.state(lease.job_id))["state"] for lease in leases] == ["end", "running", "running"]
