"""The machine of a benchmark: software versions, the code's commit, and the read bandwidth."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import numpy as np

from worker.backend import Backend
from worker.bench.result import Bandwidth, Machine
from worker.config import EngineSection

_TOOL_S = 10


def machine_of(backend: Backend) -> Machine:
    """Return the names and versions of device and software."""
    cuda = cupy = driver = None
    if backend.name == "gpu":
        from worker.gpu.bandwidth import versions  # noqa: PLC0415  (CuPy is only needed on a GPU)

        cuda, cupy = versions()
        driver = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return Machine(
        device=backend.device,
        backend=backend.name,
        cores=len(os.sched_getaffinity(0)),
        driver=driver,
        cuda=cuda,
        cupy=cupy,
        numpy=np.__version__,
        python=platform.python_version(),
    )


def read_bandwidth(backend: Backend, engine: EngineSection, nbytes: int, runs: int) -> Bandwidth:
    """How fast the backend's device reads `nbytes`, on a GPU at most half of what is free.

    Raises VramOom.
    """
    if backend.name == "gpu":
        from worker.gpu import bandwidth as gpu  # noqa: PLC0415  (as above)

        return Bandwidth(*gpu.read_seconds(engine.kernel_cache, min(nbytes, backend.available_bytes() // 2), runs))
    from worker.cpu import threads as cpu  # noqa: PLC0415  (as above)

    return Bandwidth(*cpu.read_seconds(nbytes, runs))


def commit() -> str | None:
    """Return the commit of the checkout of this file; None if it is an installed package."""
    here = Path(__file__)
    if _first_line("git", "-C", str(here.parent), "ls-files", "--error-unmatch", here.name) is None:
        return None
    return _first_line("git", "-C", str(here.parent), "describe", "--always", "--dirty", "--exclude=*")


def _first_line(*command: str) -> str | None:
    """Return the first line of a command's output; None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip()
