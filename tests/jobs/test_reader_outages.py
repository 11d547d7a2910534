"""Readers of a real server that changes its role, restarts, or closes idle connections."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from tests.jobs.echo import complete, take_next, text, tokens
from tests.jobs.harness import ServerHarness
from tests.jobs.servers import Server, running_server
from worker.jobs.client import Client
from worker.jobs.keys import events_key


async def test_a_reader_waits_while_its_server_is_a_replica(server: Server) -> None:
    harness = ServerHarness(server.url)
    raw, client, worker = Redis.from_url(server.url, protocol=2), harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lease = await take_next(worker)
    await worker.append(lease, tokens(0, 2))
    reading = asyncio.ensure_future(client.result("a"))
    waiting = asyncio.ensure_future(anext(client.events("unstarted")))
    await asyncio.sleep(0.2)
    await raw.config_set("replica-read-only", "yes")
    await raw.execute_command("REPLICAOF", "127.0.0.1", "1")  # nothing listens there: it keeps its data
    await asyncio.sleep(0.5)
    await raw.execute_command("REPLICAOF", "NO", "ONE")
    assert not reading.done()
    assert not waiting.done()
    await complete(worker, lease, 4)
    assert (await asyncio.wait_for(reading, 10))[0] == text(4)
    waiting.cancel()
    await raw.aclose()
    await harness.close()


async def test_a_client_that_was_idle_past_the_server_s_timeout_goes_on() -> None:
    with running_server() as server:
        raw, client = Redis.from_url(server.url, protocol=2), Client.from_url(server.url)
        await raw.config_set("timeout", "1")
        assert set(await asyncio.gather(*(client.submit(job_id=f"j{n}", prompt="x") for n in range(20))))
        await asyncio.sleep(3)
        await client.submit(job_id="late", prompt="x")
        assert await client.cancel("late") == "cancelled"
        assert (await client.queue_length(), len(await client.queue())) == (21, 21)
        await client.close()
        await raw.aclose()


async def test_submitting_over_a_restart_needs_no_care() -> None:
    with running_server(persistent=True) as server:
        client = Client.from_url(server.url)
        await client.submit(job_id="a", prompt="x")
        server.stop()
        server.start()
        await client.submit(job_id="b", prompt="x")
        assert [entry.job_id for entry in await client.queue()] == ["a", "b"]
        await client.close()


async def test_commands_wait_while_the_server_refuses_them(server: Server) -> None:
    raw, client = Redis.from_url(server.url, protocol=2), Client.from_url(server.url)
    await raw.config_set("min-replicas-to-write", 1)
    pending = [asyncio.ensure_future(client.submit(job_id=f"j{n}", prompt="x")) for n in range(20)]
    await asyncio.sleep(0.5)
    assert not any(call.done() for call in pending)
    await raw.config_set("min-replicas-to-write", 0)
    assert len(await asyncio.gather(*pending)) == await client.queue_length() == 20
    await client.close()
    await raw.aclose()


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
async def test_events_in_json_are_read_like_others(server: Server, encoding: str) -> None:
    harness = ServerHarness(server.url)
    client, worker = harness.client(), await harness.transport("w1")
    for job in ("a", "cancelled"):
        await client.submit(job_id=job, prompt="hello", encoding=encoding)
    await complete(worker, await take_next(worker), 3)
    assert (await client.result("a"))[0] == text(3)
    assert await client.cancel("cancelled") == "cancelled"
    for job, count in (("a", 5), ("cancelled", 1)):
        assert len([item async for item in client.events(job)]) == count
        records = await harness.connect().range(events_key(job), "-", "+", 10)
        assert len(records) == count
        assert all(fields["p"].startswith(b"{") == (encoding == "json") for _, fields in records)
    await harness.close()
