"""A reader that cannot reach the terminal event raises EventsLost; one that waits for it does not."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from tests.jobs.echo import claim_next, complete, take_next, text, tokens
from tests.jobs.harness import Harness, ServerHarness
from tests.jobs.servers import Server, running_server
from worker.errors import EventsLost, InvalidRequest
from worker.jobs import event_reader
from worker.jobs.client import Client, SyncClient
from worker.jobs.events import Token
from worker.jobs.keys import events_key, state_key


@pytest.fixture(autouse=True)
def _check_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_reader, "CHECK_MS", 50)


async def begin_answer(harness: Harness, client: Client, count: int = 3) -> AsyncIterator[Token]:
    """A reader that has received the first `count` tokens of a running job."""
    worker = await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    await worker.append(await take_next(worker), tokens(0, count))
    reading = client.tokens("a")
    assert "".join([(await anext(reading)).t for _ in range(count)]) == text(count)
    return reading


async def drop_job(harness: Harness) -> None:
    for key in (events_key("a"), state_key("a")):
        await harness.drop(key)


async def drop_everything(harness: Harness) -> None:
    for key in await harness.keys():
        await harness.drop(key)


async def test_a_flush_in_mid_answer_is_an_error(harness: Harness) -> None:
    client = harness.client()
    reading = await begin_answer(harness, client)
    await drop_everything(harness)
    with pytest.raises(EventsLost) as caught:
        await anext(reading)
    assert caught.value.code == "EVENTS_LOST"


async def test_a_reader_waits_for_a_lost_job_that_is_still_queued(harness: Harness) -> None:
    """The server lost the job's start: it starts again."""
    client = harness.client()
    reading = await begin_answer(harness, client)
    await drop_job(harness)
    rest = asyncio.ensure_future(anext(reading))
    await asyncio.sleep(0.2)
    assert not rest.done()
    rest.cancel()


@pytest.mark.parametrize("after", ["1-1", "1-4"])
async def test_resuming_an_expired_job_is_an_error(harness: Harness, after: str) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    await complete(worker, await take_next(worker), 2)
    assert [token.i async for token in client.tokens("a", "1-1")] == [1]
    assert [token.i async for token in client.tokens("a", "1-3")] == []
    await drop_job(harness)
    for read in (client.tokens, client.events):
        with pytest.raises(EventsLost):
            await anext(read("a", after))


async def test_a_slow_reader_past_retention_gets_an_error(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    await complete(worker, await take_next(worker), 300)
    received, reading = 0, client.tokens("a")
    with pytest.raises(EventsLost):  # noqa: PT012
        async for token in reading:
            assert token.i == received
            received += 1
            if received == 50:
                await drop_job(harness)
    assert 50 <= received < 300


async def test_an_ended_job_without_its_stream_is_an_error(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    await complete(worker, await take_next(worker), 2)
    await harness.drop(events_key("a"))
    for call in (client.result("a"), anext(client.tokens("a"))):
        with pytest.raises(EventsLost):
            await call


async def test_a_deleted_terminal_entry_is_an_error(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    await complete(worker, await take_next(worker), 2)
    await harness.connect().delete(events_key("a"), "1-3")
    with pytest.raises(EventsLost):
        await client.result("a")


async def test_a_waiting_job_is_waited_for(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    early = asyncio.ensure_future(client.result("a"))
    await asyncio.sleep(0.15)
    await client.submit(job_id="a", prompt="hello")
    claim = await claim_next(worker)
    await asyncio.sleep(0.15)
    await worker.release(claim)
    worker.forget(claim)
    await complete(worker, await take_next(worker), 2)
    assert (await early)[0] == text(2)


@pytest.mark.parametrize(
    ("job", "after"), [("no such job!", "0-0"), ("a", "yesterday"), ("a", "1-99999999999999999999")]
)
async def test_a_malformed_position_is_refused(harness: Harness, job: str, after: str) -> None:
    with pytest.raises(InvalidRequest):
        await anext(harness.client().events(job, after))


async def test_an_empty_server_that_comes_back_is_an_error() -> None:
    with running_server() as server:
        harness = ServerHarness(server.url)
        reading = await begin_answer(harness, harness.client())
        waiting = asyncio.ensure_future(anext(reading))
        await asyncio.sleep(0.1)
        server.stop()
        server.start()
        with pytest.raises(EventsLost):
            await waiting
        await harness.close()


def test_the_sync_client_raises_it_too(server: Server) -> None:
    async def begin() -> None:
        harness = ServerHarness(server.url)
        await begin_answer(harness, harness.client())
        await harness.close()

    asyncio.run(begin())
    with SyncClient.from_url(server.url) as client:
        reading = client.tokens("a")
        assert [next(reading).i for _ in range(3)] == [0, 1, 2]
        threading.Timer(0.1, server.flush).start()
        with pytest.raises(EventsLost):
            next(reading)
