"""How a worker stops: asked once it finishes its job within a grace period, asked twice it stops at once.

Only times and words; what stops is `service.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

_HAND_BACK_S = 3.0
"""For handing the job back after the grace period; longer, and the server is away."""
_AT_ONCE_S = 0.5
"""The same after a second signal."""


class Drain:
    """One worker's end. `reason` is empty until somebody asks for it."""

    def __init__(self) -> None:
        self.reason = ""
        self.grace_s = 0.0
        self._asked = asyncio.Event()
        self._hurry = asyncio.Event()

    def asked(self) -> bool:
        """Whether no more jobs are to be taken."""
        return self._asked.is_set()

    def begin(self, reason: str, grace_s: float) -> None:
        """Drain, leaving the running job so many seconds."""
        self.reason, self.grace_s = reason, grace_s
        self._asked.set()

    def hurry(self) -> None:
        """Leave it none."""
        self._hurry.set()

    async def wait(self) -> None:
        """Return once it has begun."""
        await self._asked.wait()

    async def run_out(self, hand_back: Callable[[], None]) -> None:
        """After the drain has begun: the grace period, then `hand_back`, then a moment; the worker ends on return."""
        await self.wait()
        await self._hurried(self.grace_s)
        hand_back()
        await self._hurried(_HAND_BACK_S)
        await asyncio.sleep(_AT_ONCE_S)

    async def _hurried(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._hurry.wait()
