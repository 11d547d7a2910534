"""The time in which a job waits for its first token: what a worker says and looks up about itself comes after it.

A few tenths of a millisecond of talk, on the loop or on the engine's thread, are as many of the job's. Knows no job;
`service.py` and `answering.py` say when it begins and ends, `reporter.py` waits for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

_LONGEST_S = 1.0
"""A long prompt must not make a worker look dead."""


class Quiet:
    """One worker's. Made on the loop or off it, used on it."""

    def __init__(self) -> None:
        self._over = asyncio.Event()
        self._over.set()
        self._bound: asyncio.TimerHandle | None = None
        self._then: Callable[[], None] | None = None

    def begin(self, then: Callable[[], None] | None = None) -> None:
        """A job waits for its first token from now on; for a second at most, as far as others are concerned.

        `then` is called when that is over, in whatever way.
        """
        self.end()
        self._over.clear()
        self._then = then
        self._bound = asyncio.get_running_loop().call_later(_LONGEST_S, self.end)

    def end(self) -> None:
        """It has it, or will have none; harmless if none waits."""
        if self._bound is not None:
            self._bound.cancel()
            self._bound = None
        self._over.set()
        then, self._then = self._then, None
        if then is not None:
            then()

    async def over(self) -> None:
        """Return when no job waits for its first token."""
        await self._over.wait()
