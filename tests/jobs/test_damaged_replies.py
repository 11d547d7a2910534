"""Replies that are repeated, lost or cut off on the way: no call returns the reply to another one.

Each fault is a function that a proxy calls with the bytes of the server. RESP has no request ids, so
a repeated reply would be taken for the reply to the next command on the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio

from tests.jobs.echo import begin, complete, text
from tests.jobs.harness import ServerHarness, assert_consistent, wait_until
from tests.jobs.proxy import ProxiedConnection, Proxy, Reply, deliver, running_proxy
from tests.jobs.servers import Server
from worker.jobs.client import Client
from worker.jobs.keys import queue_key
from worker.jobs.lease import Lease
from worker.jobs.redis_streams import RedisStreams
from worker.jobs.streams import Disconnected, retry_until_connected
from worker.jobs.transport import Transport

QUEUES = [f"q{n}" for n in range(15)]


async def twice(connection: ProxiedConnection, data: bytes) -> None:
    await deliver(connection, data + data)


async def twice_in_two_segments(connection: ProxiedConnection, data: bytes) -> None:
    await deliver(connection, data)
    await asyncio.sleep(0.002)
    await deliver(connection, data)


class LateRepetition:
    """Repeats each reply just before the next one of its connection: no byte is left over between."""

    def __init__(self) -> None:
        self._last: dict[ProxiedConnection, bytes] = {}

    async def __call__(self, connection: ProxiedConnection, data: bytes) -> None:
        last = self._last.get(connection, b"")
        self._last[connection] = data
        await deliver(connection, last + data)


class Every:
    """Applies a fault to every n-th reply."""

    def __init__(self, n: int, fault: Callable[[ProxiedConnection, bytes], Awaitable[None]]) -> None:
        self._n, self._fault, self._count = n, fault, 0

    async def __call__(self, connection: ProxiedConnection, data: bytes) -> None:
        self._count += 1
        await (deliver if self._count % self._n else self._fault)(connection, data)


async def without_its_beginning(connection: ProxiedConnection, data: bytes) -> None:
    await deliver(connection, data[2:])


async def first_half_then_closed(connection: ProxiedConnection, data: bytes) -> None:
    await deliver(connection, data[: len(data) // 2])
    connection.abort()


async def closed_instead(connection: ProxiedConnection, data: bytes) -> None:
    connection.abort()


FAULTS: dict[str, Callable[[], Reply]] = {
    "twice": lambda: twice,
    "twice, in two segments": lambda: twice_in_two_segments,
    "repeated late": LateRepetition,
    "every fifth without its beginning": lambda: Every(5, without_its_beginning),
    "every fifth cut off": lambda: Every(5, first_half_then_closed),
    "every fifth lost": lambda: Every(5, closed_instead),
}


@pytest.fixture(autouse=True)
def _short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.jobs.redis_server.COMMAND_TIMEOUT_S", 0.5)
    monkeypatch.setattr("worker.jobs.redis_server.BLOCKING_TIMEOUT_S", 2.0)


@pytest_asyncio.fixture(params=FAULTS)
async def proxy(request: pytest.FixtureRequest, server: Server) -> AsyncIterator[Proxy]:
    """A proxy of the server, each of whose replies may have the fault."""
    async with running_proxy(server.port) as opened:
        first = RedisStreams.from_url(url_of(opened))
        await first.time_ms()
        await first.close()
        opened.reply = FAULTS[request.param]()
        yield opened


def url_of(proxy: Proxy) -> str:
    return f"redis://127.0.0.1:{proxy.port}"


async def test_no_call_of_redis_py_returns_the_reply_to_another_one(server: Server, proxy: Proxy) -> None:
    direct, streams = RedisStreams.from_url(server.url), RedisStreams.from_url(url_of(proxy))
    streams._replied = True  # the first reply of all may be damaged too
    for n, queue in enumerate(QUEUES):
        for _ in range(n % 5):
            await direct.add(queue, {"p": queue.encode()}, 100, None)
    for n, queue in enumerate(QUEUES):
        assert await retry_until_connected(streams.length, queue) == n % 5
        entries = await retry_until_connected(streams.range, queue, "-", "+", 10)
        assert [fields for _, fields in entries] == [{"p": queue.encode()}] * (n % 5)
    await direct.close()
    await streams.close()


async def test_no_call_of_a_script_or_a_pipeline_returns_the_reply_to_another_one(server: Server, proxy: Proxy) -> None:
    direct, streams = Client.from_url(server.url), RedisStreams.from_url(url_of(proxy))
    streams._replied = True
    for queue in QUEUES[::2]:
        await direct.cancel(queue)
    await direct.submit(job_id="q1", prompt="hello")
    await direct.cancel("q1")
    for queue in QUEUES:
        state = await retry_until_connected(streams.job_state, queue)
        assert state.fields.get("error") == ("CANCELLED" if queue == "q1" else None)
        found, _ = await retry_until_connected(streams.find, queue, queue, "-", 10)
        assert found is None
        assert await retry_until_connected(streams.renew, queue, "w", "1-1") == "deleted"
    await direct.close()
    await streams.close()


async def test_jobs_end_over_connections_whose_replies_are_damaged(server: Server, proxy: Proxy) -> None:
    harness = ServerHarness(server.url)
    client, streams = Client.from_url(url_of(proxy)), RedisStreams.from_url(url_of(proxy))
    client._streams._replied = streams._replied = True  # type: ignore[attr-defined]
    worker = Transport(streams, "w1")
    await worker.open()
    job_ids = [await retry_until_connected(client.submit, job_id=f"j{n}", prompt="hello") for n in range(5)]
    working = asyncio.create_task(run_jobs(worker))
    results = await asyncio.gather(*map(client.result, job_ids))
    assert [answer for answer, _ in results] == [text(3)] * 5
    await wait_until(functools.partial(is_empty, harness))
    working.cancel()
    await asyncio.wait([working])
    await assert_consistent(harness, **dict.fromkeys(job_ids, text(3)))
    await client.close()
    await worker.close()
    await harness.close()


async def run_jobs(worker: Transport) -> None:
    """Complete one job after another. A submission whose reply was lost has added a second entry."""
    while True:
        if claim := await worker.claim():
            lease = await begin(worker, claim)
            if isinstance(lease, Lease):
                await complete(worker, lease, 3)
            worker.forget(claim)


async def is_empty(harness: ServerHarness) -> bool:
    return not await harness.raw.xlen(queue_key("default"))


async def test_replies_that_are_repeated_at_once_fail_no_call(server: Server) -> None:
    async with running_proxy(server.port, reply=twice) as proxy:
        streams = RedisStreams.from_url(url_of(proxy))
        for _ in range(50):
            await streams.length("queue")
            await streams.job_state("job")
        await streams.close()


@pytest.mark.parametrize("call", ["range", "read_many"])
async def test_the_first_reply_of_all_may_be_damaged_after_its_beginning(server: Server, call: str) -> None:
    """A long reply comes in parts, each of which is repeated."""
    direct = RedisStreams.from_url(server.url)
    for n in range(100):
        await direct.add("queue", {"p": b"%d" % n * 2000}, 1000, None)
    await direct.close()
    async with running_proxy(server.port, reply=twice) as proxy:
        streams = RedisStreams.from_url(url_of(proxy))
        proxy.bytes_per_s = 20e6  # several segments
        arguments = ("queue", "-", "+", 1000) if call == "range" else ({"queue": "0-0"}, 100, 1000)
        with pytest.raises(Disconnected, match=r"on the way|in time"):
            await getattr(streams, call)(*arguments)
        await streams.close()


async def test_a_server_that_is_no_redis_server_is_refused_at_the_first_call(server: Server) -> None:
    async def other_protocol(connection: ProxiedConnection, data: bytes) -> None:
        await deliver(connection, b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with running_proxy(server.port, reply=other_protocol) as proxy:
        streams = RedisStreams.from_url(url_of(proxy))
        for call in (streams.time_ms, lambda: streams.job_state("job")):
            with pytest.raises(Exception, match="does not reply as a Redis server"):
                await call()
        with contextlib.suppress(Disconnected):
            await streams.close()
