"""Waiting and running jobs of a queue, the oldest wait and the dead letters, as metrics and operators see them."""

from __future__ import annotations

import asyncio
import time

from tests.jobs.echo import claim_next, complete, take_next
from tests.jobs.harness import Harness, lease_settings, wait_until
from worker.errors import InvalidRequest
from worker.jobs.keys import queue_key

CLOCKS_MS = 20
"""Resolution of the clocks, and their difference."""
LEASE = lease_settings(lease_s=60.0, scan_s=0.02)


async def counts(client):
    depth = await client.queue_depth(lease_s=60.0)
    return depth.waiting, depth.running, depth.dead_letters


async def test_every_job_is_counted_once_from_submission_to_its_end(harness: Harness) -> None:
    client = harness.client()
    assert await counts(client) == (0, 0, 0), "a queue that does not exist"
    await client.submit(job_id="a", prompt="x")
    assert await counts(client) == (1, 0, 0), "before the first worker creates the group"
    worker = await harness.transport("w1", LEASE)
    await client.submit(job_id="b", prompt="x")
    lease = await take_next(worker)
    assert await counts(client) == (1, 1, 0)
    assert (await worker.queue_depths())["default"].running == 1
    await complete(worker, lease, 2)
    await client.cancel("b")
    assert await counts(client) == (1, 0, 0), "a cancelled job stays in the queue until a worker settles it"


async def test_a_job_that_a_worker_gave_back_waits(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1", LEASE)
    await client.submit(job_id="a", prompt="x")
    claim = await claim_next(worker)
    assert await counts(client) == (0, 1, 0)
    await worker.release(claim)
    assert await counts(client) == (1, 0, 0)


async def test_a_job_whose_worker_died_waits_after_a_lease(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1", LEASE)
    await client.submit(job_id="a", prompt="x")
    await claim_next(worker)

    async def waits():
        return (await client.queue_depth(lease_s=0.05)).waiting == 1

    await wait_until(waits)
    assert await counts(client) == (0, 1, 0), "with the lease of 60 s it runs"


async def test_the_oldest_wait_is_that_of_the_first_job_without_a_worker(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1", LEASE)
    assert (await client.queue_depth()).oldest_wait_ms == 0
    await client.submit(job_id="old", prompt="x")
    await asyncio.sleep(0.2)
    began_s = time.monotonic()
    await client.submit(job_id="new", prompt="x")
    assert (await client.queue_depth(lease_s=60.0)).oldest_wait_ms > 200 - CLOCKS_MS
    claim = await claim_next(worker)
    of_new_ms = (await client.queue_depth(lease_s=60.0)).oldest_wait_ms
    assert of_new_ms <= (time.monotonic() - began_s) * 1000 + CLOCKS_MS, "the job `old` runs"
    await worker.release(claim)
    assert (await client.queue_depth(lease_s=60.0)).oldest_wait_ms > 200 - CLOCKS_MS


async def test_a_deleted_entry_of_a_dead_worker_does_not_wait(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1", LEASE)
    for job_id in ("a", "b"):
        await client.submit(job_id=job_id, prompt="x")
    entries = [(await claim_next(worker)).entry_id for _ in range(2)]
    await asyncio.sleep(0.2)
    assert (await client.queue_depth(lease_s=0.05)).oldest_wait_ms > 200 - CLOCKS_MS
    for entry_id in entries:
        assert await harness.connect().delete(queue_key("default"), entry_id)
    depth = await client.queue_depth(lease_s=0.05)
    assert (depth.waiting, depth.running, depth.oldest_wait_ms) == (0, 0, 0)
    began_s = time.monotonic()
    await client.submit(job_id="c", prompt="x")
    depth = await client.queue_depth(lease_s=0.05)
    assert (depth.waiting, depth.running) == (1, 0)
    assert depth.oldest_wait_ms <= (time.monotonic() - began_s) * 1000 + CLOCKS_MS


async def test_dead_letters_are_counted_for_each_queue(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1", LEASE)
    await harness.connect().enqueue("default", {"p": b"no payload"}, 100)
    claim = await claim_next(worker)
    await worker.dead_letter(claim, InvalidRequest("no payload"))
    assert await counts(client) == (0, 0, 1)
    assert (await client.queue_depth("other")).dead_letters == 0
