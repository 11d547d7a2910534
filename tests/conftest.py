"""Shared fixtures: tiny models, created once per session, and SmolLM2."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.tiny_models import make_tiny
from worker.config import load_settings
from worker.text.template_process import TemplateProcess


def pytest_configure() -> None:
    """Restore SIGINT, which a suite in the background ignores, and so would child processes.

    Examples of hypothesis have no time limit: on a loaded machine any of them may take a second.
    """
    settings.register_profile("tests", settings.get_profile(settings.get_current_profile_name()), deadline=None)
    settings.load_profile("tests")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Leave the collected tests out of garbage collections: each full one would take 0.25 s or more.

    Such a pause exceeds the timeouts that some tests set.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def template_process() -> Iterator[TemplateProcess]:
    """One process that renders the chats of all tokenizers of the session: each would start one."""
    process = TemplateProcess()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worker.text.tokenizer.TemplateProcess", lambda: process)
        yield process
    process.stop()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from the name of a model of `tests/tiny_models.py` to its file."""
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
