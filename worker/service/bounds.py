"""What may end an attempt before its answer does: somebody's word, a deadline, or the time allowed for inference.

Words arrive while the attempt waits for something else; it looks here each time it wakes. Times are of
`time.monotonic`. Knows no job and no server; `attempt.py` asks, `service.py` speaks.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable
from enum import IntEnum
from typing import TypeVar

from worker.errors import Cancelled, InferenceTimeout

T = TypeVar("T")


class Stop(IntEnum):
    """Why an attempt is to end; the highest one counts."""

    DRAIN = 1
    """Hand the job back: the grace period is over."""
    CANCEL = 2
    LOST = 3
    """The entry is somebody else's: write nothing more."""
    STALLED = 4
    """The engine hangs and the worker will end: leave the job, and wait for nothing."""


class Stopped(Exception):
    """The attempt is to end for `why`, which is not the job's fault."""

    def __init__(self, why: Stop) -> None:
        super().__init__(why.name)
        self.why = why


class Bounds:
    """The bounds of one attempt, which runs the engine for at most `allowance_s` seconds, replay not counted."""

    def __init__(self, allowance_s: float) -> None:
        self.wake = asyncio.Event()
        """Set whenever the attempt has something to look at."""
        self.stop: Stop | None = None
        self._allowance_s = allowance_s
        self._deadline = self._limit = math.inf
        self._paused: float | None = None

    def interrupt(self, why: Stop) -> None:
        """End the attempt at the next token boundary."""
        self.stop = why if self.stop is None else max(self.stop, why)
        self.wake.set()

    def expire_in(self, seconds: float) -> None:
        """The job's deadline is so far away, or past."""
        self._deadline = time.monotonic() + seconds

    def start_engine(self) -> None:
        """The allowance counts from now on."""
        self._limit = time.monotonic() + self._allowance_s

    def replayed(self, at: float, last: bool) -> None:
        """A replayed token came at `at`. The allowance stands still from the first one to the last."""
        self._paused = at if self._paused is None else self._paused
        if last:
            self._limit += at - self._paused

    def too_late(self) -> InferenceTimeout | None:
        """The error that a passed deadline makes of the job, if it has passed."""
        if time.monotonic() < self._deadline:
            return None
        return InferenceTimeout("the job's deadline has passed")

    def check(self, replaying: bool = False) -> None:
        """Raises Stopped, Cancelled or InferenceTimeout if the attempt is to end."""
        if self.stop is Stop.CANCEL:
            raise Cancelled("cancelled by request")
        if self.stop is not None:
            raise Stopped(self.stop)
        if error := self.too_late():
            raise error
        if time.monotonic() >= self._limit and not replaying:
            raise InferenceTimeout(f"no end after {self._allowance_s:g} s of inference")

    async def wait(self, until: float = math.inf, replaying: bool = False) -> None:
        """Wait to be woken, at most until `until` or the nearest bound."""
        nearest = min(until, self._deadline, math.inf if replaying else self._limit)
        left = None if nearest == math.inf else max(0.0, nearest - time.monotonic())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(left):
                await self.wake.wait()
        self.wake.clear()

    async def guard(self, work: Awaitable[T]) -> T:
        """The result of `work`, unless the attempt ends before: then it is forgotten. Raises as `check` does."""
        task = asyncio.ensure_future(work)
        task.add_done_callback(lambda _: self.wake.set())
        try:
            while not task.done():
                self.check()
                await self.wait()
            return task.result()
        finally:
            task.cancel()
