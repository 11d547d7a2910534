"""The rights that docs/operations.md lists for each user suffice for all of its calls."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.jobs.echo import begin, claim_next, complete, take_next, text
from tests.jobs.harness import LONG_LEASE, lease_settings
from tests.jobs.servers import Server, running_server
from worker.cli.jobs import _show_all
from worker.config import LeaseSection
from worker.errors import ServerRefused
from worker.jobs.client import Client
from worker.jobs.redis_streams import RedisStreams
from worker.jobs.transport import Transport

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
USERS = {line.split()[2]: line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("ACL SETUSER ")}
AT_ONCE = lease_settings(lease_s=0.0, scan_s=0.02, max_attempts=1)


@pytest.fixture
def server() -> Iterator[Server]:
    with running_server() as started, redis.Redis(port=started.port) as admin:
        for line in USERS.values():
            admin.execute_command(*line.split())
        yield started


def streams(server: Server, user: str) -> RedisStreams:
    return RedisStreams.from_url(f"redis://{user}:PASSWORD@127.0.0.1:{server.port}/1?client_name=test")


async def worker(server: Server, name: str, lease: LeaseSection) -> Transport:
    transport = Transport(streams(server, "worker"), name, lease=lease)
    await transport.open()
    transport._streams.waits_for_access = False  # a missing right must fail the test, not be waited for
    return transport


async def test_a_worker_and_a_program(server: Server) -> None:
    program, running = Client(streams(server, "program")), await worker(server, "w1", LONG_LEASE)
    await running.registration.heartbeat({"state": "ready"})
    assert set(await program.workers()) == {"w1"}
    await program.submit(job_id="a", prompt="hello")
    lease = await take_next(running)
    assert await program.cancel("a") == "requested"
    assert (await running.renew(lease)).value == "cancel_requested"
    await complete(running, lease, 3)
    assert (await program.result("a"))[0] == text(3)
    await program.submit(job_id="b", prompt="hello")
    assert await program.cancel("b") == "cancelled"
    with pytest.raises(ServerRefused, match="'xdel'"):
        await program.drop_dead_letter("1-1")
    await running.close()
    await program.close()


async def test_workers_that_take_over_and_an_operator(server: Server) -> None:
    operator = Client(streams(server, "operator"))
    showing = asyncio.create_task(_show_all(streams(server, "operator"), "default", None, lambda _: None))
    await operator.submit(job_id="a", prompt="hello")
    first = await worker(server, "w1", LONG_LEASE)
    await first.registration.heartbeat({"state": "ready"})
    await first.release(await take_next(first))
    barren, last = await worker(server, "w2", AT_ONCE), await worker(server, "w3", AT_ONCE)
    await take_next(barren)
    await begin(last, await claim_next(last))
    assert [entry.job_id for entry in await operator.queue()] == []
    assert (await operator.queue_depth()).dead_letters == (await first.queue_depths())["default"].dead_letters == 1
    letter = (await operator.dead_letters())[0]
    assert await operator.dead_letter(letter.entry_id)
    assert await operator.retry_dead_letter(letter) == "a.r1"
    await operator.drain("w1")
    for transport in (first, barren, last):
        await transport.close()
    assert not showing.done()
    showing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await showing
    await operator.close()


async def test_a_gateway(server: Server) -> None:
    gateway, running = Client(streams(server, "gateway")), await worker(server, "w1", LONG_LEASE)
    await gateway.submit(job_id="a", prompt="hello")
    assert (await gateway.queue_depth()).waiting == 1
    await complete(running, await take_next(running), 3)
    assert (await gateway.result("a"))[0] == text(3)
    assert len(await gateway.published("a")) > 3
    await gateway.forget("a", 60)
    assert await gateway.is_known("a")
    documents = gateway.documents
    await documents.put("inf:d", {"a": "1"}, 60_000)
    assert await documents.get("inf:d") == {"a": b"1"}
    assert await documents.put_once("inf:d", "b", "2")
    assert await documents.values("inf:d", ["b"]) == [b"2"]
    assert sorted(await documents.names("inf:d")) == ["a", "b"]
    await documents.increment("inf:d", "n")
    await documents.expire("inf:d", 60_000)
    await documents.shorten("inf:d", 50_000)
    assert await documents.delete("inf:d")
    await documents.enlist("inf:i", "a", 1, 60_000)
    assert await documents.listed("inf:i") == ["a"]
    await documents.unlist("inf:i", "a")
    assert await documents.hold("inf:l", "one", 60_000)
    assert await documents.hold("inf:l", "one", 60_000)
    await documents.release("inf:l", "one")
    await running.close()
    await gateway.close()
