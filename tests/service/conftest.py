"""Fixtures: harnesses of the transport's tests, shared models, an engine thread."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.jobs.conftest import harness_of, server, session_server  # noqa: F401  # fixtures are found by name
from tests.jobs.harness import FakeRedisHarness
from tests.service.models import SharedModel
from worker.cli import _SWITCH_S
from worker.service.engine_thread import EngineThread


@pytest.fixture(params=["memory", "fakeredis", "server"])
async def harness(request):
    """A harness of each kind but the cluster, which the transport's tests cover."""
    created = harness_of(request)
    yield created
    await created.close()


@pytest.fixture
async def fake():
    """A harness on fakeredis, for tests that do not depend on the kind of server."""
    fakeredis = FakeRedisHarness()
    yield fakeredis
    await fakeredis.close()


@pytest.fixture(scope="session")
def model(tiny: Callable[[str], Path]) -> Callable[[str], SharedModel]:
    """Returns a tiny model by its name, loaded once a session."""
    loaded: dict[str, SharedModel] = {}

    def of(name: str = "qwen2") -> SharedModel:
        if name not in loaded:
            loaded[name] = SharedModel.from_file(tiny(name))
        return loaded[name]

    return of


@pytest.fixture
async def thread():
    """An engine thread without an engine."""
    thread = EngineThread()
    yield thread
    thread.stop()
    assert await asyncio.to_thread(thread.join, 10)


@pytest.fixture
def short_switch_interval():
    """The GIL switch interval that `worker run` sets."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    yield
    sys.setswitchinterval(before)
