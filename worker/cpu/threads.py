"""A few threads that share one matrix product by rows of the weight, always cut in the same places.

BLAS's own threads are turned off: they wait by spinning, which on a busy machine costs ten times what they bring, and
their number would move bits. Here every machine computes the same slabs, however many threads take them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from threadpoolctl import threadpool_limits

SLABS = 4
"""Pieces of a weight's rows; also the most threads that can help."""
_WORTH_SHARING = 1 << 18
"""Elements of a weight below which waking a thread costs more than it brings."""

Work = Callable[[int, int], None]


class Threads:
    """Runs `work(start, stop)` over slabs of rows, on this thread and up to SLABS - 1 others."""

    def __init__(self, count: int | None = None) -> None:
        count = min(SLABS, len(os.sched_getaffinity(0)) if count is None else count)
        threadpool_limits(limits=1, user_api="blas")
        self._others = ThreadPoolExecutor(count - 1, thread_name_prefix="cpu-rows") if count > 1 else None
        self._count = count

    def over_rows(self, rows: int, cols: int, work: Work) -> None:
        """Call `work` for every slab of `rows`, and return when all are done; it may raise what `work` raises."""
        size = -(-rows // SLABS)
        slabs = [(start, min(start + size, rows)) for start in range(0, rows, size)]
        if self._others is None or rows * cols < _WORTH_SHARING:
            _each(work, slabs)
            return
        shares = [slabs[i :: self._count] for i in range(self._count)]
        pending = [self._others.submit(_each, work, share) for share in shares[1:]]
        _each(work, shares[0])
        for share in pending:
            share.result()


def _each(work: Work, slabs: list[tuple[int, int]]) -> None:
    for start, stop in slabs:
        work(start, stop)
