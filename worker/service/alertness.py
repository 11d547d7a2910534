"""The moment after a job in which the event loop does not sleep, as the next job often comes at once.

Who sleeps wakes slowly: its core has gone to rest and its caches are cold, so that the same code takes five times as
long. That costs a job's first token more than half a millisecond, and the moment costs a core. `service.py` says when.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager

_SPARE_CORES = 4
"""A machine of fewer has none to give away: those who submit and read want them."""


class Alertness:
    """One worker's, for `seconds` after each job. Used on its loop."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds if (os.cpu_count() or 1) >= _SPARE_CORES else 0.0
        self._until = 0.0

    def renew(self) -> None:
        """A job has ended."""
        self._until = asyncio.get_running_loop().time() + self._seconds

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While the block waits for something, and the moment lasts, the loop does not sleep."""
        awake = asyncio.create_task(self._stay_awake())
        try:
            yield
        finally:
            awake.cancel()

    async def _stay_awake(self) -> None:
        loop = asyncio.get_running_loop()
        while loop.time() < self._until:
            await asyncio.sleep(0)
