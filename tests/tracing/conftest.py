"""Fixtures: a receiver, and the servers and models of the service's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.jobs.conftest import server, session_server  # noqa: F401
from tests.service.conftest import fake, model  # noqa: F401  # fixtures are found by name
from tests.tracing.receiver import Receiver, receiver
from worker.tracing import otlp


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """A receiver; whoever closes its tracing waits until it has received all."""
    monkeypatch.setattr(otlp, "CLOSE_S", 30.0)
    with receiver() as received:
        yield received
