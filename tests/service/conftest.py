"""Worlds of the transport's tests, and models to serve in them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.jobs.conftest import harness, server, session_server  # noqa: F401  # fixtures are found by name
from tests.jobs.harness import FakeRedisHarness
from tests.service.serving import Model
from worker.service.engine_thread import EngineThread


@pytest.fixture
async def fake():
    """fakeredis alone, for what does not depend on the server's kind."""
    made = FakeRedisHarness()
    yield made
    await made.close()


@pytest.fixture(scope="session")
def model(tiny: Callable[[str], Path]) -> Callable[[str], Model]:
    """A tiny model by its name, loaded once; every worker gets an engine of its own over it."""
    made: dict[str, Model] = {}

    def of(name: str = "qwen2") -> Model:
        if name not in made:
            made[name] = Model.from_file(tiny(name))
        return made[name]

    return of


@pytest.fixture
async def thread():
    """An engine's thread that owns no engine yet."""
    thread = EngineThread()
    yield thread
    thread.stop()
    assert await asyncio.to_thread(thread.join, 10)


@pytest.fixture
def short_turns():
    """As `worker run` sets it: how long a thread keeps Python's lock."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.001)
    yield
    sys.setswitchinterval(before)
