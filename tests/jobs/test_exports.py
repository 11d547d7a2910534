"""The public names of the package `worker`, and what importing them loads."""

from __future__ import annotations

import subprocess
import sys

import pytest

import worker
from worker.jobs.client import Client, SyncClient
from worker.jobs.protocol import Job

HEAVY = ("cupy", "numpy", "gguf", "worker.gpu", "worker.engine", "worker.cpu", "worker.runtime", "worker.cli")


def test_the_client_is_exported_at_the_top_level() -> None:
    assert (worker.Client, worker.SyncClient, worker.Job) == (Client, SyncClient, Job)
    assert set(worker.__all__) == {"Client", "SyncClient", "Job", "__version__"}
    with pytest.raises(AttributeError, match="module 'worker' has no attribute 'Server'"):
        worker.Server  # noqa: B018


def test_importing_the_client_loads_neither_engine_nor_gpu_nor_numpy() -> None:
    code = f"import sys; from worker import Client, SyncClient, Job; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_importing_the_package_loads_no_redis() -> None:
    code = "import sys, worker; print([m for m in ('redis', 'pydantic', 'worker.jobs') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
