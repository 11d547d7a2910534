"""Fixtures that several rooms share: tiny models made once a session, and the small real one."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny_models import make_tiny
from worker.config import load_settings


def pytest_configure() -> None:
    """A suite that a script runs in the background ignores SIGINT, and so would the processes that tests interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The path of a tiny model of `tests/tiny_models.py`, by its name."""
    folder = tmp_path_factory.mktemp("tiny")

    def path_of(name: str) -> Path:
        path = folder / f"{name}.gguf"
        return path if path.exists() else make_tiny(name, path)

    return path_of


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, which `make test` pulls before the suite starts."""
    from worker import hub

    return hub.resolve("smollm2", load_settings().hub.cache)
