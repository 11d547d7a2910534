"""Fixtures: a real server, and a harness over each implementation of `Streams`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from tests.jobs.harness import FakeRedisHarness, Harness, MemoryHarness, ServerHarness
from tests.jobs.servers import Server, running_server


@pytest.fixture(scope="session")
def session_server() -> Iterator[Server]:
    """One server process for the session."""
    with running_server() as server:
        yield server


@pytest.fixture
def server(session_server: Server) -> Server:
    """The server, flushed."""
    session_server.flush()
    return session_server


@pytest_asyncio.fixture(params=["memory", "fakeredis", "server"])
async def harness(request: pytest.FixtureRequest) -> AsyncIterator[Harness]:
    """A harness over an empty server, of each kind."""
    if request.param == "memory":
        created: Harness = MemoryHarness()
    elif request.param == "fakeredis":
        created = FakeRedisHarness()
    else:
        created = ServerHarness(request.getfixturevalue("server").url)
    yield created
    await created.close()
