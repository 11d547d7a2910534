"""Fixtures: a real server, shared models, an in-process worker that echoes its prompt."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.gateway.gateways import Gateway, gateway
from tests.jobs.conftest import server, session_server  # noqa: F401  # fixtures are found by name
from tests.jobs.harness import Harness, ServerHarness
from tests.jobs.servers import Server
from tests.llama_cpp import LlamaCpp
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


@pytest.fixture(scope="session")
def smollm2_model(smollm2: Path) -> SharedModel:
    """SmolLM2, loaded once."""
    return SharedModel.from_file(smollm2)


@pytest.fixture
async def smollm2_gate(harness: Harness, smollm2_model: SharedModel) -> AsyncIterator[Gateway]:
    """A gateway beside a worker of SmolLM2."""
    worker = serving(harness, smollm2_model.fresh(name="SmolLM2"), lease=LONG_LEASE)
    async with worker, gateway(harness) as running:
        await running.wait_for_model("SmolLM2")
        yield running


@pytest.fixture(scope="session")
def llama(smollm2: Path) -> Iterator[LlamaCpp]:
    """llama.cpp's own server with SmolLM2."""
    with LlamaCpp(smollm2, context=512) as started:
        yield started
