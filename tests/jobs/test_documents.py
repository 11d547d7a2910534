"""Documents over fakeredis, a real server and a cluster."""

from __future__ import annotations

import asyncio

import pytest

from tests.jobs.conftest import harness_of
from tests.jobs.harness import ServerHarness, wait_until
from tests.jobs.servers import running_server
from worker.jobs.streams import Disconnected


@pytest.fixture(params=["fakeredis", "server", "cluster"])
async def documents(request):
    harness = harness_of(request)
    yield harness.connect().documents
    await harness.close()


async def test_a_document_is_read_as_written_until_it_expires(documents):
    await documents.put("d", {"a": "1", "b": b"\xff"}, 60_000)
    await documents.put("d", {"a": "2"}, 60_000)

    assert await documents.get("d") == {"a": b"2", "b": b"\xff"}
    assert await documents.values("d", ["b", "c"]) == [b"\xff", None]
    assert sorted(await documents.names("d")) == ["a", "b"]

    await documents.expire("d", 1)

    async def gone() -> bool:
        return await documents.get("d") == {}

    await wait_until(gone)


async def test_a_field_is_put_once(documents):
    assert await documents.put_once("d", "1", "first")
    assert not await documents.put_once("d", "1", "second")
    assert await documents.get("d") == {"1": b"first"}


async def test_an_increment_counts(documents):
    await documents.increment("d", "n")
    await documents.increment("d", "n")

    assert await documents.values("d", ["n"]) == [b"2"]


async def test_a_time_to_live_is_shortened_and_not_lengthened(documents):
    await documents.put("d", {"a": "1"}, 60_000)
    await documents.shorten("d", 1)
    await documents.shorten("d", 60_000)

    async def gone() -> bool:
        return await documents.get("d") == {}

    await wait_until(gone)


async def test_a_deleted_document_is_gone(documents):
    await documents.put("d", {"a": "1"}, 60_000)

    assert await documents.delete("d")
    assert not await documents.delete("d")


async def test_an_index_lists_the_newest_first_and_drops_the_old(documents):
    for time_ms, member in enumerate(("a", "b", "c"), 10):
        await documents.enlist("i", member, 1000 * time_ms, keep_ms=1000)

    assert await documents.listed("i") == ["c", "b"]

    await documents.unlist("i", "c")

    assert await documents.listed("i") == ["b"]


async def test_a_lease_has_one_owner_until_it_ends(documents):
    assert await documents.hold("l", "one", 60_000)
    assert await documents.hold("l", "one", 60_000), "the owner renews it"
    assert not await documents.hold("l", "two", 60_000)

    await documents.release("l", "two")
    assert not await documents.hold("l", "two", 60_000)

    await documents.release("l", "one")
    assert await documents.hold("l", "two", 60_000)


async def test_a_lease_that_is_not_renewed_expires(documents):
    await documents.hold("l", "one", 20)

    async def taken() -> bool:
        return await documents.hold("l", "two", 60_000)

    await wait_until(taken)


async def test_a_server_that_is_gone_raises_disconnected():
    with running_server() as server:
        harness = ServerHarness(server.url)
        documents = harness.connect().documents
        await documents.put("d", {"a": "1"}, 60_000)
        server.stop()
        with pytest.raises(Disconnected):
            await asyncio.wait_for(documents.get("d"), 10)
        await harness.close()
