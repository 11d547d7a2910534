"""`Streams.overview`: a queue in one call, the same in memory and on a server."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.jobs.harness import Harness, MemoryHarness, ServerHarness
from worker.jobs import redis_streams
from worker.jobs.keys import START, queue_key

LEASE_MS = 60_000


@pytest_asyncio.fixture(params=["memory", "server"])
async def harness(request: pytest.FixtureRequest) -> AsyncIterator[Harness]:
    """Without fakeredis, which has no XINFO STREAM FULL."""
    created = MemoryHarness() if request.param == "memory" else ServerHarness(request.getfixturevalue("server").url)
    yield created
    await created.close()


async def test_of_a_queue_that_does_not_exist(harness: Harness) -> None:
    found = await harness.connect().overview("none", LEASE_MS, START, 10)
    assert (found.length, found.delivered, found.pending_count, found.first_waiting) == (0, START, 0, "")
    assert (list(found.pending), list(found.entries)) == ([], [])
    assert abs(found.now_ms - await harness.connect().time_ms()) < 60_000


async def test_of_running_and_waiting_jobs_and_of_those_above_a_cursor(harness: Harness) -> None:
    streams = harness.connect()
    await streams.open_queue("q")
    ids = [await streams.enqueue("q", {"p": b"%d" % n, "traceparent": b"t"}, 1000) or "" for n in range(25)]
    for _ in range(2):
        await streams.read_new(["q"], "w1", 0)
    await streams.read_new(["q"], "w2", 0)
    found = await streams.overview("q", LEASE_MS, START, 21)
    assert (found.length, found.pending_count, found.delivered, found.first_waiting) == (25, 3, ids[2], ids[3])
    assert [(row.entry_id, row.consumer, row.deliveries) for row in found.pending] == [
        (ids[0], "w1", 1),
        (ids[1], "w1", 1),
        (ids[2], "w2", 1),
    ]
    assert list(found.entries) == [(ids[n], b"%d" % n) for n in range(21)]
    rest = await streams.overview("q", LEASE_MS, ids[20], 100)
    assert list(rest.entries) == [(ids[n], b"%d" % n) for n in range(21, 25)]
    assert len((await streams.overview("q", LEASE_MS, START, 2)).pending) == 2
    assert list((await streams.overview("q", LEASE_MS, None, 100)).entries) == []
    await streams.settle("q", ids[0], None)
    found = await streams.overview("q", LEASE_MS, ids[24], 100)
    assert (found.length, found.pending_count, list(found.entries)) == (24, 2, [])


async def test_a_job_that_was_not_renewed_for_a_lease_waits_as_in_the_depth(harness: Harness) -> None:
    streams = harness.connect()
    await streams.open_queue("q")
    ids = [await streams.enqueue("q", {"p": b"x"}, 10) or "" for _ in range(3)]
    for _ in ids[:2]:
        await streams.read_new(["q"], "w", 0)
    assert await streams.give_back("q", "w", ids[0], 90_000, 1)
    found, depth = await streams.overview("q", LEASE_MS, None, 10), await streams.depth("q", LEASE_MS)
    assert (found.running, found.first_waiting, found.pending_count) == (1, ids[0], 2)
    assert (depth.running, depth.waiting) == (found.running, found.length - found.running) == (1, 2)
    found = await streams.overview("q", 100_000, None, 10)
    assert (found.running, found.first_waiting) == (2, ids[2])


async def test_a_deleted_entry_of_a_dead_worker_does_not_wait(harness: Harness) -> None:
    streams = harness.connect()
    await streams.open_queue("q")
    ids = [await streams.enqueue("q", {"p": b"x"}, 10) or "" for _ in range(3)]
    for entry_id in ids[:2]:
        await streams.read_new(["q"], "w", 0)
        await streams.give_back("q", "w", entry_id, 90_000, 1)
    for entry_id, first_waiting in zip(ids, (ids[1], ids[2], ""), strict=True):
        assert await streams.delete(queue_key("q"), entry_id)
        found = await streams.overview("q", LEASE_MS, None, 10)
        assert (found.running, found.first_waiting) == (0, first_waiting)


async def test_entries_end_after_a_number_of_bytes(server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_streams, "OVERVIEW_BYTES", 2500)
    harness = ServerHarness(server.url)
    streams = harness.connect()
    for _ in range(60):
        await streams.enqueue("q", {"p": b"x" * 100}, 1000)
    found = await streams.overview("q", LEASE_MS, START, 1000)
    assert len(found.entries) == 30, "it reads ten at a time, and the third ten exceed the bound"
    rest = await streams.overview("q", LEASE_MS, found.entries[-1][0], 1000)
    assert len({entry_id for entry_id, _ in (*found.entries, *rest.entries)}) == 60
    await harness.close()
