"""Many readers over few connections: latency, fairness, slow readers, cancellation, closing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence

import pytest
from redis.asyncio import Redis

from tests.jobs.echo import complete, take_next, text
from tests.jobs.harness import Harness, ServerHarness
from tests.jobs.memory_streams import MemoryStreams
from tests.jobs.servers import Server
from worker.errors import ServerRefused
from worker.jobs import shared_reads
from worker.jobs.shared_reads import SharedReads
from worker.jobs.streams import Disconnected, Record

LATE_S = 0.5
"""Far below a block of 2 s, far above the time that a busy machine needs."""


class Counting(MemoryStreams):
    """Counts concurrent and total reads."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = self.calls = 0

    async def read_many(self, after: Mapping[str, str], block_ms: int, count: int) -> dict[str, list[Record]]:
        self.now, self.calls = self.now + 1, self.calls + 1
        self.most = max(self.most, self.now)
        try:
            return await super().read_many(after, block_ms, count)
        finally:
            self.now -= 1


async def add(streams: object, key: str) -> str:
    return await streams.add(key, {"x": b"1"}, 1000, None)  # type: ignore[attr-defined, no-any-return]


async def test_hundreds_of_readers_use_few_calls_and_each_gets_its_entries() -> None:
    streams = Counting()
    reads = SharedReads(streams)
    waiting = [asyncio.ensure_future(reads.read(f"k{n}", "0-0", 10_000)) for n in range(300)]
    await asyncio.sleep(0.05)
    for n in reversed(range(300)):
        entry_id = await add(streams, f"k{n}")
        began = time.monotonic()
        records = await waiting[n]
        assert [record[0] for record in records] == [entry_id]
        assert time.monotonic() - began < LATE_S
    assert streams.most <= shared_reads.SLOTS
    assert streams.calls < 1000
    await reads.close()


async def test_a_new_reader_is_served_while_the_others_block(harness: Harness) -> None:
    streams = harness.connect()
    reads = SharedReads(streams)
    waiting = []
    for n in range(8):  # one after the other: more than there are slots
        waiting.append(asyncio.ensure_future(reads.read(f"idle{n}", "0-0", 60_000)))
        await asyncio.sleep(0.03)
    await add(streams, "new")
    began = time.monotonic()
    assert await reads.read("new", "0-0", 60_000)
    assert time.monotonic() - began < LATE_S
    await add(streams, "idle3")
    assert await waiting[3]
    assert time.monotonic() - began < LATE_S
    await reads.close()


async def test_idle_readers_do_not_poll() -> None:
    streams = Counting()
    reads = SharedReads(streams)
    waiting = []
    for n in range(20):
        waiting.append(asyncio.ensure_future(reads.read(f"idle{n}", "0-0", 60_000)))
        await asyncio.sleep(0.005)
    await asyncio.sleep(shared_reads.BLOCK_MS / 1000 + 0.5)  # the first long calls end, and the readers are merged
    calls = streams.calls
    await asyncio.sleep(1.0)
    assert streams.calls - calls <= shared_reads.SLOTS
    await reads.close()
    for reader in waiting:
        with pytest.raises(RuntimeError, match="closed"):
            await reader


async def test_readers_of_one_stream_at_different_positions_each_get_what_follows(harness: Harness) -> None:
    streams = harness.connect()
    ids = [await add(streams, "k") for _ in range(3)]
    reads = SharedReads(streams)
    positions = ["0-0", ids[0], ids[1], ids[2]]
    replies = [asyncio.ensure_future(reads.read("k", after, 5000)) for after in positions]
    received = [[record[0] for record in await reply] for reply in replies[:3]]
    assert received == [ids, ids[1:], ids[2:]]
    last = await add(streams, "k")
    assert [record[0] for record in await replies[3]] == [last]
    await reads.close()


async def test_a_slow_reader_delays_nobody_and_holds_one_page(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    for job in ("slow", "fast"):
        await client.submit(job_id=job, prompt="hello")
        await complete(worker, await take_next(worker), 250)
    slow = client.tokens("slow")
    assert (await anext(slow)).i == 0
    began = time.monotonic()
    assert (await client.result("fast"))[0] == text(250)
    assert time.monotonic() - began < 2 * LATE_S
    assert [token.i async for token in slow] == list(range(1, 250))


async def test_a_cancelled_reader_leaves_the_others_waiting(harness: Harness) -> None:
    streams = harness.connect()
    reads = SharedReads(streams)
    first, second = (asyncio.ensure_future(reads.read(key, "0-0", 60_000)) for key in ("k1", "k2"))
    await asyncio.sleep(0.05)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert (first.cancelled(), second.done(), reads.readers) == (True, False, 1)
    await add(streams, "k1")
    await add(streams, "k2")
    assert await second
    await reads.close()


async def test_a_time_out_returns_nothing_at_about_its_time(harness: Harness) -> None:
    reads = SharedReads(harness.connect())
    began = time.monotonic()
    assert await reads.read("k", "0-0", 100) == []
    assert 0.09 < time.monotonic() - began < LATE_S
    await reads.close()


async def test_readers_of_a_closed_client_raise(harness: Harness) -> None:
    client = harness.client()
    waiting = asyncio.ensure_future(anext(client.events("a")))
    await asyncio.sleep(0.05)
    await client.close()
    with pytest.raises(RuntimeError, match="the client is closed"):
        await waiting
    with pytest.raises(RuntimeError, match="the client is closed"):
        await anext(client.events("a"))


async def test_a_failed_call_is_raised_by_its_readers_only() -> None:
    class Failing(MemoryStreams):
        async def read_many(self, after: Mapping[str, str], block_ms: int, count: int) -> dict[str, list[Record]]:
            if "bad" in after:
                raise Disconnected("lost")
            return await super().read_many(after, block_ms, count)

    streams = Failing()
    reads = SharedReads(streams)
    good = asyncio.ensure_future(reads.read("good", "0-0", 5000))
    await asyncio.sleep(0.01)
    with pytest.raises(Disconnected):
        await reads.read("bad", "0-0", 5000)
    await add(streams, "good")
    assert await good
    await reads.close()


async def test_a_refused_key_fails_its_readers_only(server: Server) -> None:
    harness = ServerHarness(server.url)
    reads, streams = SharedReads(harness.connect()), harness.connect()
    await harness.raw.set("text", "no stream")
    waiting = [asyncio.ensure_future(reads.read(f"k{n}", "0-0", 60_000)) for n in range(50)]
    for _ in range(2):
        with pytest.raises(ServerRefused):
            await reads.read("text", "0-0", 60_000)
    assert not any(reader.done() for reader in waiting)
    for n in range(50):
        await add(streams, f"k{n}")
    assert all(await asyncio.gather(*waiting))
    await reads.close()
    await harness.close()


async def test_a_server_that_refuses_keys_of_several_slots_is_read_one_by_one() -> None:
    class Cluster(MemoryStreams):
        refused = 0

        async def read_many(self, after: Mapping[str, str], block_ms: int, count: int) -> dict[str, list[Record]]:
            if len(after) > 1:
                self.refused += 1
                raise ServerRefused("keys in several slots", {"reply": "CROSSSLOT"})
            return await super().read_many(after, block_ms, count)

    streams = Cluster()
    reads = SharedReads(streams)

    async def read(key: str) -> Sequence[Record]:
        while not (records := await reads.read(key, "0-0", 5000)):
            pass
        return records

    for turn in range(3):
        waiting = [asyncio.ensure_future(read(f"k{n}{turn}")) for n in range(10)]
        await asyncio.sleep(0.05)
        for n in range(10):
            await add(streams, f"k{n}{turn}")
        assert all(await asyncio.gather(*waiting))
    assert streams.refused == 1
    await reads.close()


async def test_readers_submitters_and_cancels_by_the_hundred_over_few_connections(server: Server) -> None:
    harness = ServerHarness(server.url)
    client, raw = harness.client(), Redis.from_url(server.url, protocol=2)
    jobs = [f"j{n}" for n in range(300)]
    readers = [asyncio.ensure_future(client.result(job)) for job in jobs]
    await asyncio.sleep(0)
    assert await asyncio.gather(*(client.submit(job_id=job, prompt="hello") for job in jobs)) == jobs
    blocked = [each for each in await raw.client_list() if each["cmd"] == "xread"]
    assert len(blocked) <= shared_reads.SLOTS
    assert set(await asyncio.gather(*map(client.cancel, jobs[100:]))) == {"cancelled"}
    worker = await harness.transport("w1")
    for _ in range(100):
        await complete(worker, await take_next(worker), 3)
    results = await asyncio.gather(*readers, return_exceptions=True)
    assert [result[0] for result in results[:100] if isinstance(result, tuple)] == [text(3)] * 100
    assert {str(error) for error in results[100:]} == {"CANCELLED: cancelled by request"}
    await raw.aclose()
    await harness.close()
