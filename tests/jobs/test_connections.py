"""Connections: enough for many callers, replaced if closed or dead, noticed within 5 s."""

from __future__ import annotations

import asyncio
import socket
import time
import traceback

import pytest
from redis.asyncio import Redis

from tests.jobs.echo import complete, take_next, text, tokens
from tests.jobs.harness import ServerHarness
from tests.jobs.proxy import running_proxy
from tests.jobs.servers import Server, running_server
from worker.config import LeaseSection
from worker.errors import ServerRefused
from worker.jobs.client import Client, SyncClient
from worker.jobs.lease import Claim
from worker.jobs.redis_server import COMMAND_TIMEOUT_S
from worker.jobs.redis_streams import RedisStreams
from worker.jobs.streams import Disconnected, retry_until_connected
from worker.jobs.transport import Transport

NOTICED_S = 5.0


async def test_500_simultaneous_submits_and_cancels_succeed(server: Server) -> None:
    client = Client.from_url(server.url)
    job_ids = await asyncio.gather(*(client.submit(prompt="hello") for _ in range(500)))
    outcomes = await asyncio.gather(*(client.cancel(job_id) for job_id in job_ids))
    assert set(outcomes) == {"cancelled"}
    assert len(await client.queue(1000)) == 500
    await client.close()


async def test_a_cancelled_caller_does_not_keep_a_connection(server: Server) -> None:
    streams = RedisStreams.from_url(server.url)
    for _ in range(20):
        calls = [asyncio.create_task(streams.time_ms()) for _ in range(100)]
        await asyncio.sleep(0.002)
        for call in calls[::2]:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    async with asyncio.timeout(2):
        await asyncio.gather(*(streams.time_ms() for _ in range(100)))
    await streams.close()


async def test_a_caller_waits_for_a_blocking_read_to_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.jobs.redis_server.BLOCKING_CONNECTIONS", 2)
    streams = RedisStreams.from_url(server.url)
    assert await asyncio.gather(*(streams.read("inf:control", "0-0", 100) for _ in range(6))) == [[]] * 6
    await streams.close()


async def idle_clients_are_closed(server: Server) -> None:
    admin = Redis.from_url(server.url)
    await admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    await admin.aclose()


async def test_a_connection_that_the_server_closed_is_replaced_before_it_is_used(server: Server) -> None:
    client = Client.from_url(server.url)
    await client.submit(prompt="hello")
    await idle_clients_are_closed(server)
    await client.submit(prompt="hello")
    await client.close()


def test_a_connection_closed_while_no_event_loop_runs_is_replaced(server: Server) -> None:
    with SyncClient.from_url(server.url) as client:
        client.submit(prompt="hello")
        asyncio.run(idle_clients_are_closed(server))
        client.submit(prompt="hello")


async def test_a_dead_connection_of_a_submitter_is_noticed(server: Server) -> None:
    async with running_proxy(server.port) as proxy:
        streams = RedisStreams.from_url(f"redis://127.0.0.1:{proxy.port}")
        await asyncio.gather(*(streams.time_ms() for _ in range(20)))
        proxy.mute()
        began_s = time.monotonic()
        with pytest.raises(Disconnected, match="no reply in time"):
            await streams.enqueue("default", {"p": b"x"}, 10)
        await asyncio.gather(*(streams.time_ms() for _ in range(20)))
        assert time.monotonic() - began_s < NOTICED_S
        await streams.close()


async def test_a_dead_connection_of_a_reader_is_noticed(server: Server) -> None:
    harness = ServerHarness(server.url)
    async with running_proxy(server.port) as proxy:
        reader = Client.from_url(f"redis://127.0.0.1:{proxy.port}")
        worker = await harness.transport("w1")
        await reader.submit(job_id="a", prompt="hello")
        lease = await take_next(worker)
        reading = asyncio.create_task(reader.result("a"))
        await asyncio.sleep(0.2)
        proxy.mute()
        await worker.append(lease, tokens(0, 2))
        began_s = time.monotonic()
        await complete(worker, lease, 3)
        assert (await reading)[0] == text(3)
        assert time.monotonic() - began_s < NOTICED_S
        await reader.close()
    await harness.close()


async def test_dead_connections_of_an_idle_worker_are_noticed(server: Server) -> None:
    async with running_proxy(server.port) as proxy:
        streams = RedisStreams.from_url(f"redis://127.0.0.1:{proxy.port}")
        worker, client = Transport(streams, "w1", lease=LeaseSection()), Client.from_url(server.url)
        await worker.open()
        await asyncio.gather(*(worker.server_time_ms() for _ in range(5)))

        async def claimed() -> Claim:
            while True:
                if claim := await worker.claim():
                    return claim

        claiming = asyncio.create_task(claimed())
        await asyncio.sleep(0.7)
        proxy.mute()
        began_s = time.monotonic()
        await client.submit(job_id="a", prompt="hello")
        claim = await claiming
        assert time.monotonic() - began_s < NOTICED_S
        assert (await worker.renew(claim)).value == "held"
        await client.close()
        await streams.close()


async def test_a_lease_survives_a_dead_connection(server: Server) -> None:
    """The time-out of a reply and the time between renewals are together less than a lease."""
    lease = LeaseSection()
    async with running_proxy(server.port) as proxy:
        streams = RedisStreams.from_url(f"redis://127.0.0.1:{proxy.port}")
        worker, client = Transport(streams, "w1", lease=lease), Client.from_url(server.url)
        other = Transport(RedisStreams.from_url(server.url), "w2", lease=lease)
        await client.submit(job_id="a", prompt="hello")
        await worker.open()
        held = await take_next(worker)
        await other.open()
        await worker.renew(held)
        proxy.mute()
        await asyncio.sleep(lease.renew_s)
        renewing = asyncio.create_task(worker.renew(held))
        while not renewing.done():
            assert await other.claim() is None
        assert (await renewing).value == "held"
        await client.close()
        await streams.close()
        await other.close()


async def test_megabytes_over_a_slow_link_are_not_a_dead_connection(server: Server) -> None:
    """Sending and receiving them takes longer than a reply may be silent."""
    payload = b"x" * (5 << 20)
    async with running_proxy(server.port) as proxy:
        proxy.bytes_per_s = 1.5e6
        streams = RedisStreams.from_url(f"redis://127.0.0.1:{proxy.port}")
        await streams.open_queue("default")
        began_s = time.monotonic()
        entry_id = await streams.enqueue("default", {"p": payload}, 10)
        assert time.monotonic() - began_s > COMMAND_TIMEOUT_S
        entry = (await streams.read_new(["default"], "w1", 100))["default"]
        assert (entry.id, entry.fields) == (entry_id, {"p": payload})
        await streams.close()


async def test_the_kernel_watches_an_idle_connection(server: Server) -> None:
    streams = RedisStreams.from_url(server.url)
    await streams.time_ms()
    (connection,) = streams._server.commands.connections
    link = connection._writer.get_extra_info("socket")
    assert link.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert link.getsockopt(socket.SOL_TCP, socket.TCP_KEEPIDLE) == 2
    assert link.getsockopt(socket.SOL_TCP, socket.TCP_USER_TIMEOUT) == 4000
    await streams.close()


async def test_no_representation_holds_a_password(server: Server) -> None:
    streams = RedisStreams.from_url(server.url.replace("redis://", "redis://us3r:s3cret@"))
    with pytest.raises(ServerRefused) as caught:
        await streams.time_ms()
    pool = streams._server.commands
    shown = f"{streams!r} {streams._server!r} {pool!r} {pool.connections!r} {caught.value!r}"
    shown += "".join(traceback.format_exception(caught.value))
    assert "s3cret" not in shown
    assert "us3r" not in shown
    await streams.close()


async def test_a_unix_socket(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("s") / "redis.sock"
    with running_server("--unixsocket", str(path)):
        streams = RedisStreams.from_url(f"unix://{path}?db=3")
        assert await retry_until_connected(streams.time_ms)
        await streams.close()


async def test_no_connection_is_left_open(server: Server) -> None:
    streams = RedisStreams.from_url(server.url)
    await asyncio.gather(*(streams.time_ms() for _ in range(50)))
    connections = streams._server.commands.connections
    await streams.close()
    assert 1 < len(connections) <= 32
    assert not any(connection.is_connected for connection in connections)
