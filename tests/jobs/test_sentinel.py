"""A master behind Sentinel: failover in the middle of an answer, and what is wrong with a URL."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.jobs.echo import complete, take_next, text, tokens
from tests.jobs.harness import LONG_LEASE
from tests.jobs.sentinels import SERVICE, MonitoredServers, monitored_servers
from tests.jobs.servers import free_port
from worker.errors import ServerRefused
from worker.jobs.client import Client, SyncClient
from worker.jobs.redis_streams import RedisStreams
from worker.jobs.streams import Disconnected
from worker.jobs.transport import Transport


@pytest.fixture(scope="module")
def monitored() -> Iterator[MonitoredServers]:
    with monitored_servers() as servers:
        yield servers


async def failure_of(url: str) -> Exception:
    streams = RedisStreams.from_url(url)
    try:
        with pytest.raises((ServerRefused, Disconnected)) as caught:
            await streams.time_ms()
        return caught.value
    finally:
        await streams.close()


def test_the_sync_client_reaches_the_master(monitored: MonitoredServers) -> None:
    with SyncClient.from_url(monitored.url) as client:
        job_id = client.submit(prompt="hello")
        assert [entry.job_id for entry in client.queue()] == [job_id]
        assert client.cancel(job_id) == "cancelled"


async def test_an_unknown_service_is_named_as_the_cause(monitored: MonitoredServers) -> None:
    url = monitored.url.replace(f"/{SERVICE}/", "/other/")
    error = await failure_of(url)
    assert isinstance(error, ServerRefused)
    assert "the sentinels monitor no service of the name in the URL (NOSERVICE)" in error.message


async def test_sentinels_that_are_down_are_named_as_the_cause() -> None:
    url = f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{free_port()}/{SERVICE}"
    assert str(await failure_of(url)) == f"cannot reach {url} (no sentinel replied: connection refused)"


async def test_a_server_in_place_of_the_sentinels_is_named_as_the_cause(monitored: MonitoredServers) -> None:
    url = f"redis+sentinel://127.0.0.1:{monitored.servers[0].port}/{SERVICE}"
    error = await failure_of(url)
    assert isinstance(error, ServerRefused)
    assert error.message == (
        f"{url} refuses: it is no Sentinel; use redis://HOST for a server, "
        "or the sentinels' ports, by default 26379 (NOSENTINEL)"
    )


async def test_one_sentinel_of_three_suffices(monitored: MonitoredServers) -> None:
    port = monitored.sentinels[2].port
    streams = RedisStreams.from_url(f"redis+sentinel://127.0.0.1:{free_port()},[::1]:{port},127.0.0.1:{port}/{SERVICE}")
    assert await streams.time_ms() > 0
    await streams.close()


async def test_an_answer_continues_on_the_new_master() -> None:
    with monitored_servers() as monitored:
        client = Client.from_url(monitored.url)
        worker = Transport(RedisStreams.from_url(monitored.url), "w1", lease=LONG_LEASE)
        await worker.open()
        await client.submit(job_id="a", prompt="hello")
        reading = asyncio.create_task(client.result("a"))
        lease = await take_next(worker)
        await worker.append(lease, tokens(0, 2))
        monitored.servers[0].stop()
        await asyncio.wait_for(worker.append(lease, tokens(2, 3)), 60)
        await complete(worker, lease, 5)
        assert (await asyncio.wait_for(reading, 60))[0] == text(5)
        assert monitored.run(monitored.servers[1], "ROLE")[0] == "master"
        await worker.close()
        await client.close()
