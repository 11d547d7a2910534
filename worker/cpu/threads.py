"""Threads that share a matrix product by rows of the weight, in slabs equal on every host.

BLAS runs single-threaded: its threads spin while they wait, which is slow on a busy host, and their
number changes bits. The slabs do not depend on the number of threads, so here it changes none.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import threadpool_limits

SLABS = 4
"""Number of row ranges of a weight, and the upper bound of useful threads."""
_MIN_SHARED_ELEMENTS = 1 << 18
"""Smaller weights use the calling thread alone: waking another one costs more than it saves."""
_READ_ROW_BYTES = 1 << 20

SlabFn = Callable[[int, int], None]


class Threads:
    """Runs a function over slabs of rows, on the calling thread and up to SLABS - 1 others."""

    def __init__(self, count: int | None = None) -> None:
        self._count = min(SLABS, len(os.sched_getaffinity(0)) if count is None else count)
        threadpool_limits(limits=1, user_api="blas")
        self._pool = ThreadPoolExecutor(self._count - 1, thread_name_prefix="cpu-rows") if self._count > 1 else None

    def over_rows(self, rows: int, cols: int, fn: SlabFn) -> None:
        """Call `fn(start, stop)` for every slab of `rows` and wait. Raises what `fn` raises."""
        size = -(-rows // SLABS)
        slabs = [(start, min(start + size, rows)) for start in range(0, rows, size)]
        if self._pool is None or rows * cols < _MIN_SHARED_ELEMENTS:
            _run_slabs(fn, slabs)
            return
        pending = [self._pool.submit(_run_slabs, fn, slabs[i :: self._count]) for i in range(1, self._count)]
        _run_slabs(fn, slabs[:: self._count])
        for share in pending:
            share.result()


def _run_slabs(fn: SlabFn, slabs: list[tuple[int, int]]) -> None:
    for start, stop in slabs:
        fn(start, stop)


def read_seconds(nbytes: int, runs: int) -> tuple[int, list[float]]:
    """Measure read bandwidth: the bytes a run sums, about `nbytes`, and the seconds of each run.

    `nbytes` must exceed the caches. The threads are those of the matrix products.
    """
    data = np.ones((max(1, nbytes // _READ_ROW_BYTES), _READ_ROW_BYTES // 4), np.float32)
    threads, seconds = Threads(), []
    for _ in range(runs + 1):
        began = time.perf_counter()
        threads.over_rows(*data.shape, lambda start, stop: data[start:stop].sum())
        seconds.append(time.perf_counter() - began)
    return data.nbytes, seconds[1:]
