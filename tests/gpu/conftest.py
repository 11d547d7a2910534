"""What tests on a GPU start from; where there is none, each of them is skipped by name and says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.suite import why_no_gpu


@pytest.fixture(scope="session")
def gpu():
    """CuPy, or a skip."""
    reason = why_no_gpu()
    if reason:
        pytest.skip(reason)
    import cupy

    return cupy


@pytest.fixture(scope="session")
def kernels(gpu):
    """Kernels in the user's cache, so that a second run of the suite compiles only what changed."""
    from worker.gpu.compiler import Kernels

    return Kernels(Path.home() / ".cache" / "worker" / "kernels")


@pytest.fixture
def memory(gpu):
    """The device's memory, with nothing of it in use."""
    from worker.gpu.memory import DeviceMemory

    return DeviceMemory()


@pytest.fixture(scope="session")
def smollm2_here(gpu):
    """SmolLM2's file where it was pulled; a GPU machine may have no package index to pull it from."""
    from worker import hub
    from worker.config import load_settings
    from worker.errors import ModelLoadFailed

    try:
        return hub.resolve("smollm2", load_settings().hub.cache)
    except ModelLoadFailed as error:
        pytest.skip(f"SmolLM2 is not here: {error}")
