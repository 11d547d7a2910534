"""How fast this host reads: NumPy's sum, on the threads of the products. Knows no model. Next: `worker/bench/`."""

from __future__ import annotations

import time

import numpy as np

from worker.cpu.threads import Threads

_ROW = 1 << 20


def read_seconds(nbytes: int, runs: int) -> tuple[int, list[float]]:
    """The bytes that a run reads, about `nbytes` (more than the caches hold), and the seconds of each run."""
    data = np.ones((max(1, nbytes // _ROW), _ROW // 4), np.float32)
    threads, times = Threads(), []
    for _ in range(runs + 1):
        began = time.perf_counter()
        threads.over_rows(*data.shape, lambda start, stop: data[start:stop].sum())
        times.append(time.perf_counter() - began)
    return data.nbytes, times[1:]
