"""How fast this card reads, and what it calls itself: what every speed is measured against. Knows no model.

Next: `worker/bench/machine.py`.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np

from worker.gpu.compiler import Kernels
from worker.gpu.memory import DeviceMemory, Purpose

INSTANTIATIONS = (("read_all.cu", "read_all"),)

_THREADS = 512
_LOADS = 8  # in flight a thread
_WORD = 16
_GRIDS = (4, 8, 16)  # blocks a multiprocessor: which is best differs from card to card


def read_seconds(kernel_cache: Path, nbytes: int, runs: int) -> tuple[int, list[float]]:
    """The bytes that a run reads, about `nbytes` (several GB: no cache holds them), and the seconds of each run.

    The runs are those of the grid with the least median; the memory is free again afterwards. Raises VramOom.
    """
    import cupy  # noqa: PLC0415

    processors = cupy.cuda.Device().attributes["MultiProcessorCount"]
    whole = max(_GRIDS) * processors * _THREADS * _LOADS * _WORD
    nbytes = max(1, nbytes // whole) * whole
    data = DeviceMemory().reserve(nbytes, Purpose.WORKSPACE).array((nbytes,), np.uint8)
    data.data.memset(1, nbytes)
    kernel, out = Kernels(kernel_cache).get(*INSTANTIATIONS[0]), cupy.zeros(1, np.uint32)
    began, ended = cupy.cuda.Event(), cupy.cuda.Event()

    def seconds(grid: int) -> float:
        began.record()
        kernel((processors * grid,), (_THREADS,), (data, np.uint64(nbytes // _WORD), out))
        ended.record()
        ended.synchronize()
        return float(cupy.cuda.get_elapsed_time(began, ended)) / 1e3

    seconds(_GRIDS[0])
    return nbytes, min(([seconds(grid) for _ in range(runs)] for grid in _GRIDS), key=statistics.median)


def versions() -> tuple[str, str]:
    """CUDA's and CuPy's."""
    import cupy  # noqa: PLC0415

    cuda = cupy.cuda.runtime.runtimeGetVersion()
    return f"{cuda // 1000}.{cuda % 1000 // 10}", str(cupy.__version__)
