"""Read bandwidth of the device, the reference of measured speeds; versions of CUDA and CuPy.

Kernel: `read_all.cu`. Next: `worker/bench/bench.py`.
"""

import statistics
from pathlib import Path

import numpy as np

from worker.gpu.compiler import Kernels
from worker.gpu.memory import DeviceMemory, Purpose

INSTANTIATIONS = (("read_all.cu", "read_all"),)

_THREADS = 512
_LOADS = 8  # in flight a thread
_WORD = 16  # bytes of a load
_GRIDS = (4, 8, 16)  # blocks a multiprocessor: the best differs between cards
DEFINES = {"READ_THREADS": _THREADS, "READ_LOADS": _LOADS}


def read_seconds(kernel_cache: Path, nbytes: int, runs: int) -> tuple[int, list[float]]:
    """Bytes read by a run, about `nbytes` (more than any cache holds), and the seconds of each run.

    Of several grids the one with the lowest median counts. The memory is freed afterwards. Raises:
    VramOom.
    """
    import cupy  # noqa: PLC0415

    processors = cupy.cuda.Device().attributes["MultiProcessorCount"]
    step = max(_GRIDS) * processors * _THREADS * _LOADS * _WORD
    nbytes = max(1, nbytes // step) * step
    data = DeviceMemory().reserve(nbytes, Purpose.WORKSPACE).array((nbytes,), np.uint8)
    data.data.memset(1, nbytes)
    kernel, out = Kernels(kernel_cache).get(*INSTANTIATIONS[0]), cupy.zeros(1, np.uint32)
    start, end = cupy.cuda.Event(), cupy.cuda.Event()

    def seconds(grid: int) -> float:
        start.record()
        kernel((processors * grid,), (_THREADS,), (data, np.uint64(nbytes // _WORD), out))
        end.record()
        end.synchronize()
        return float(cupy.cuda.get_elapsed_time(start, end)) / 1e3

    seconds(_GRIDS[0])
    return nbytes, min(([seconds(grid) for _ in range(runs)] for grid in _GRIDS), key=statistics.median)


def versions() -> tuple[str, str]:
    """Versions of CUDA and CuPy."""
    import cupy  # noqa: PLC0415

    cuda = cupy.cuda.runtime.runtimeGetVersion()
    return f"{cuda // 1000}.{cuda % 1000 // 10}", str(cupy.__version__)
