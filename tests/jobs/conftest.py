"""Fixtures: a real server, and a harness over each implementation of `Streams`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from tests.jobs.cluster import ClusterServer, running_cluster
from tests.jobs.harness import ClusterHarness, FakeRedisHarness, Harness, MemoryHarness, ServerHarness
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


@pytest.fixture(scope="session")
def session_cluster() -> Iterator[ClusterServer]:
    """Three masters for the session, which no test stops."""
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(session_cluster: ClusterServer) -> ClusterServer:
    """The cluster, flushed."""
    session_cluster.flush()
    return session_cluster


def harness_of(request: pytest.FixtureRequest) -> Harness:
    """A harness over an empty server of the kind that is the fixture's parameter."""
    if request.param == "memory":
        return MemoryHarness()
    if request.param == "fakeredis":
        return FakeRedisHarness()
    if request.param == "cluster":
        return ClusterHarness(request.getfixturevalue("cluster"))
    return ServerHarness(request.getfixturevalue("server").url)


@pytest_asyncio.fixture(params=["memory", "fakeredis", "server", "cluster"])
async def harness(request: pytest.FixtureRequest) -> AsyncIterator[Harness]:
    """A harness of each kind."""
    created = harness_of(request)
    yield created
    await created.close()
