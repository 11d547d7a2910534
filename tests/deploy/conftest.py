"""The server of `tests/jobs`, and a client."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.jobs.conftest import server, session_server  # noqa: F401  # fixtures are found by name
from tests.jobs.servers import Server
from worker.jobs.client import SyncClient


@pytest.fixture
def client(server: Server) -> Iterator[SyncClient]:  # noqa: F811
    with SyncClient.from_url(server.url) as connected:
        yield connected
