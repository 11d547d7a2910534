"""Where a benchmark runs: versions, the commit of the code, and how fast the device reads. Knows no model."""

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
    """What the device and the software call themselves."""
    cuda = cupy = driver = None
    if backend.name == "gpu":
        from worker.gpu.bandwidth import versions  # noqa: PLC0415  (the CPU's benchmark needs no CuPy)

        cuda, cupy = versions()
        driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
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
    """How fast the backend's device reads `nbytes`, on a GPU at most half of what is free. Raises VramOom."""
    if backend.name == "gpu":
        from worker.gpu import bandwidth as gpu  # noqa: PLC0415  (as above)

        return Bandwidth(*gpu.read_seconds(engine.kernel_cache, min(nbytes, backend.available_bytes() // 2), runs))
    from worker.cpu import bandwidth as cpu  # noqa: PLC0415  (as above)

    return Bandwidth(*cpu.read_seconds(nbytes, runs))


def commit() -> str | None:
    """The commit of this very file's checkout; None where it comes from an installed package."""
    here = Path(__file__)
    if _said("git", "-C", str(here.parent), "ls-files", "--error-unmatch", here.name) is None:
        return None
    return _said("git", "-C", str(here.parent), "describe", "--always", "--dirty", "--exclude=*")


def _said(*command: str) -> str | None:
    """The first line that a command prints; None if it can't be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip()
