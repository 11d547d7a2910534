"""The worlds that the transport's tests run in."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from tests.jobs.harness import FakeRedisHarness, Harness, MemoryHarness, ServerHarness
from tests.jobs.servers import Server, running_server


@pytest.fixture(scope="session")
def session_server() -> Iterator[Server]:
    """A real server for the whole session."""
    with running_server() as server:
        yield server


@pytest.fixture
def server(session_server: Server) -> Server:
    """A real server with nothing on it."""
    session_server.empty()
    return session_server


@pytest_asyncio.fixture(params=["memory", "fakeredis", "server"])
async def harness(request: pytest.FixtureRequest) -> AsyncIterator[Harness]:
    """An empty harness of each kind."""
    if request.param == "memory":
        made: Harness = MemoryHarness()
    elif request.param == "fakeredis":
        made = FakeRedisHarness()
    else:
        made = ServerHarness(request.getfixturevalue("server").url)
    yield made
    await made.close()
