"""A CUDA graph of work that was launched once, and what the driver's errors mean to a worker.

Knows nothing of what is captured; all of its memory must outlive the graph and stay where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from worker.errors import CudaError, VramOom

_MEMORY_ALLOCATION = 2  # cudaErrorMemoryAllocation, and CUDA_ERROR_OUT_OF_MEMORY alike


def captured(work: Callable[[], None], stream: Any) -> Any:
    """The graph of everything that `work` launches on `stream`; nothing runs. Launch it with `graph.launch(stream)`.

    What `work` needs must be there, its kernels loaded, its scratch allocated: a dry run has seen to that.
    """
    stream.begin_capture()
    try:
        work()
    except BaseException:
        stream.end_capture()  # else the stream would stay in capture for ever
        raise
    graph = stream.end_capture()
    graph.upload(stream)
    return graph


@contextmanager
def device_errors() -> Iterator[None]:
    """Turn the driver's errors into the worker's: VramOom for an allocation, CudaError for all others.

    A launch or a wait reports what went wrong on the device, and then so does everything after it: the process ends.
    """
    try:
        yield
    except Exception as error:
        from cupy.cuda import driver, memory, runtime  # noqa: PLC0415

        if isinstance(error, memory.OutOfMemoryError):
            raise VramOom(str(error)) from error
        if not isinstance(error, (runtime.CUDARuntimeError, driver.CUDADriverError)):
            raise
        if error.status == _MEMORY_ALLOCATION:
            raise VramOom(str(error)) from error
        raise CudaError(str(error), {"status": error.status}) from error
