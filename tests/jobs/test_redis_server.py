"""Tests that need a real server: restarts, blocking reads, the script cache, the commands used."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from redis.crc import key_slot

from tests.jobs.echo import begin, claim_next, complete, take_next, text, tokens
from tests.jobs.harness import (
    LONG_LEASE,
    NO_LEASE,
    SHORT_LEASE,
    ServerHarness,
    assert_consistent,
    lease_settings,
    wait_until,
)
from tests.jobs.servers import Server, running_server
from tests.jobs.stream_checker import assert_none, find_violations
from worker.jobs import redis_server
from worker.jobs.keys import dead_key, events_key, queue_key, state_key
from worker.jobs.lease import Claim
from worker.jobs.redis_streams import RedisStreams
from worker.jobs.streams import Disconnected


@pytest_asyncio.fixture
async def real(server: Server) -> AsyncIterator[ServerHarness]:
    harness = ServerHarness(server.url)
    yield harness
    await harness.close()


async def test_a_job_continues_across_a_restart_of_the_server() -> None:
    with running_server(persistent=True) as server:
        harness = ServerHarness(server.url)
        client, worker = harness.client(), await harness.transport("w1", SHORT_LEASE)
        for job_id in ("a", "b"):
            await client.submit(job_id=job_id, prompt="hello")
        lease = await take_next(worker)
        await worker.append(lease, tokens(0, 2))
        server.stop()
        writing = asyncio.create_task(worker.append(lease, tokens(2, 3)))
        assert await worker.claim() is None
        server.start()
        await writing
        await complete(worker, lease, 4)
        found: list[Claim] = []

        async def next_is_claimed() -> bool:
            found.extend(claim for claim in [await worker.claim()] if claim)
            return bool(found)

        await wait_until(next_is_claimed)
        lease = await begin(worker, found[0])
        await complete(worker, lease, 1)
        assert_none(await find_violations(harness.connect(), "default", {"a": text(4), "b": text(1)}))
        await harness.close()


async def test_a_reconnection_is_counted() -> None:
    with running_server(persistent=True) as server:
        streams = RedisStreams.from_url(server.url)
        await streams.open_queue("default")
        assert streams.reconnects == 0
        server.stop()
        server.start()
        with contextlib.suppress(Disconnected):
            await streams.time_ms()
        await streams.time_ms()
        assert streams.reconnects == 1
        await streams.close()


async def test_an_unreachable_server_is_reported_at_once_without_retries() -> None:
    with running_server() as server:
        streams = RedisStreams.from_url(server.url)
        await streams.open_queue("default")
    loop = asyncio.get_running_loop()
    since = loop.time()
    with pytest.raises(Disconnected):
        await streams.time_ms()
    with pytest.raises(Disconnected):
        await streams.read_new(["default"], "w1", 1000)
    assert loop.time() - since < 2.0
    await streams.close()


async def test_a_blocking_read_may_exceed_the_command_timeout(
    real: ServerHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_server, "COMMAND_TIMEOUT_S", 1.0)
    streams = real.connect()
    await streams.open_queue("default")
    loop = asyncio.get_running_loop()
    since = loop.time()
    assert await streams.read_new(["default"], "w1", 1500) == {}
    assert await streams.read("inf:control", "0-0", 1500) == []
    assert loop.time() - since > 2.95
    assert streams.reconnects == 0


async def test_commands_are_served_while_a_read_blocks(real: ServerHarness) -> None:
    streams = real.connect()
    await streams.open_queue("default")
    blocked = asyncio.create_task(streams.read_new(["default"], "w1", 5000))
    next_command = asyncio.create_task(streams.read("inf:control", "0-0", 5000))
    for _ in range(20):
        await streams.time_ms()
    assert not blocked.done()
    await streams.enqueue("default", {"p": b"x"}, 10)
    await streams.add("inf:control", {"do": b"drain"}, 10, None)
    assert (await blocked)["default"].fields == {"p": b"x"}
    assert len(await next_command) == 1


async def test_work_continues_after_the_server_loses_its_scripts_and_data(real: ServerHarness) -> None:
    client, worker = real.client(), await real.transport("w1", NO_LEASE)
    await client.submit(job_id="a", prompt="hello")
    await complete(worker, await take_next(worker), 1)
    await real.raw.script_flush()
    await real.raw.flushall()
    await client.submit(job_id="b", prompt="hello")
    assert await worker.claim() is None
    await complete(worker, await take_next(worker), 1)
    assert (await client.result("b"))[0] == text(1)


async def test_a_lease_on_a_recreated_queue_is_lost(real: ServerHarness) -> None:
    client, worker = real.client(), await real.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    claim = await claim_next(worker)
    await real.raw.flushall()
    await client.submit(job_id="b", prompt="hello")
    assert (await worker.renew(claim)).value == "lost"


async def test_a_cancellation_that_arrives_with_the_reply_is_raised() -> None:
    waiting = asyncio.Event()

    async def reply_that_drops_the_cancellation() -> str:
        waiting.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "the reply"

    calling = asyncio.create_task(
        RedisStreams.from_url("redis://127.0.0.1:1")._call("read", reply_that_drops_the_cancellation())
    )
    await waiting.wait()
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling


async def test_a_loop_of_calls_can_be_cancelled_at_any_step(real: ServerHarness) -> None:
    streams = real.connect()

    async def call_forever() -> None:
        while True:
            await streams.time_ms()

    for steps in range(60):
        calling = asyncio.create_task(call_forever())
        for _ in range(steps):
            await asyncio.sleep(0)
        calling.cancel()
        done, _ = await asyncio.wait([calling], timeout=1)
        assert done, f"the cancellation after {steps} steps was lost"


async def test_one_xadd_with_json_submits_a_job(real: ServerHarness) -> None:
    worker = await real.transport("w1")
    await real.raw.xadd("inf:{q:default}:jobs", {"p": '{"job_id": "cli", "prompt": "hello", "seed": 5}'})
    await complete(worker, await take_next(worker), 2)
    entries = await real.raw.xrange("inf:{job:cli}:events")
    assert [fields[b"type"] for _, fields in entries] == [b"started", b"tokens", b"tokens", b"end"]


async def test_the_keys_of_one_script_share_a_slot() -> None:
    assert key_slot(events_key("a").encode()) == key_slot(state_key("a").encode())
    assert key_slot(queue_key("q").encode()) == key_slot(dead_key("q").encode())
    assert len({key_slot(events_key(f"j{n}").encode()) for n in range(50)}) > 30


async def test_no_command_is_newer_than_redis_7_0(real: ServerHarness) -> None:
    await real.raw.config_resetstat()
    client, lease = real.client(), lease_settings(lease_s=0.0, scan_s=0.02, max_attempts=1)
    await client.submit(job_id="a", prompt="hello")
    worker = await real.transport("w1", LONG_LEASE)
    await worker.registration.heartbeat({"state": "ready"})
    await worker.release(await take_next(worker))
    await take_next(await real.transport("w2", lease))
    last = await real.transport("w3", lease)
    await begin(last, await claim_next(last))
    await client.retry_dead_letter((await client.dead_letters())[0])
    await client.cancel("a.r1")
    leaving = await real.transport("w4")
    await begin(leaving, await claim_next(leaving))
    await leaving.close()
    used = {name.removeprefix("cmdstat_") for name in await real.raw.info("commandstats")}
    used -= {"client|setinfo", "hello"}  # sent by redis-py, which ignores a failure
    assert {"xclaim", "evalsha", "xgroup|delconsumer"} <= used
    for name in used:
        _, docs = await real.raw.execute_command("COMMAND DOCS", name)
        since = docs[docs.index(b"since") + 1]
        assert [int(part) for part in since.split(b".")] <= [7, 0, 0], name


async def test_a_call_that_was_refused_in_its_middle_is_completed_by_its_repetition() -> None:
    with running_server() as server:
        real = ServerHarness(server.url)
        client, worker = real.client(), await real.transport("w1", LONG_LEASE)
        await client.submit(job_id="a", prompt="hello")
        lease = await take_next(worker)
        await real.raw.execute_command("ACL", "SETUSER", "default", "-hset", "-xdel")
        running = asyncio.create_task(complete(worker, lease, 2))
        for right in ("hset", "xdel"):
            await asyncio.sleep(0.3)
            assert not running.done()
            await real.raw.execute_command("ACL", "SETUSER", "default", f"+{right}")
        await running
        assert await client.queue() == []
        assert (await client.state("a"))["state"] == "end"
        await assert_consistent(real, a=text(2))
        await real.close()
