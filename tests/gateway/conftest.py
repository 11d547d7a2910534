"""Fixtures: a real server, shared models, an in-process worker that echoes its prompt."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.gateway.gateways import Gateway, gateway
from tests.jobs.conftest import server, session_server  # noqa: F401  # fixtures are found by name
from tests.jobs.harness import Harness, ServerHarness
from tests.jobs.servers import Server
from tests.service.conftest import model  # noqa: F401
from tests.service.models import SharedModel
from tests.service.serving import LONG_LEASE, Worker, serving


@pytest.fixture
async def harness(server: Server) -> AsyncIterator[Harness]:  # noqa: F811
    """A harness over a real server, which is empty."""
    created = ServerHarness(server.url)
    yield created
    await created.close()


@pytest.fixture
async def echo(harness: Harness) -> AsyncIterator[Worker]:
    """A worker whose answers repeat their prompts."""
    async with serving(harness, SharedModel.echo().fresh(), lease=LONG_LEASE) as worker:
        yield worker


@pytest.fixture
async def gate(harness: Harness, echo: Worker) -> AsyncIterator[Gateway]:
    """A gateway beside the worker `echo`."""
    async with gateway(harness) as running:
        await running.wait_for_model("echo")
        yield running
