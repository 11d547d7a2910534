"""How a worker is: its state, as the health endpoints, the registry and the metrics tell it. Cached facts alone.

Nothing here asks a server or a device. `service.py` and `reporter.py` keep it current.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Literal

from worker.backend import MemoryUse
from worker.errors import VramOom
from worker.telemetry import Metrics

State = Literal["starting", "ready", "busy", "draining", "failed"]


class Health:
    """One worker's. `silence_s` gives seconds since a claim poll or a renewal succeeded."""

    def __init__(self, meters: Metrics, silence_s: Callable[[], float], patience_s: float) -> None:
        self.state: State = "starting"
        self.degraded = False
        """An allocation failed during a job, and none has succeeded since."""
        self.memory = MemoryUse()
        self.jobs = 0
        """Attempts that ended."""
        self.changed = asyncio.Event()
        self._meters = meters
        self._silence_s = silence_s
        self._patience_s = patience_s
        self._settled = time.monotonic()

    def enter(self, state: State) -> None:
        """Change the state; a worker that drains or failed is neither ready nor busy again."""
        if self.state == "failed" or (self.state == "draining" and state in ("ready", "busy")):
            return
        self.state = state
        self._meters.entered(state)
        self.changed.set()

    def ended(self, outcome: str) -> None:
        """An attempt ended, which took the server's word."""
        self.jobs += 1
        self._settled = time.monotonic()
        if outcome in ("completed", VramOom.code.lower()):
            self.degraded = outcome != "completed"
        self.enter("ready")

    @property
    def reached(self) -> bool:
        """Whether the server was heard of within three scan periods."""
        return min(self._silence_s(), time.monotonic() - self._settled) < self._patience_s

    @property
    def alive(self) -> bool:
        """/livez: it loads a model, or it polls and renews."""
        return self.state != "failed" and (self.state == "starting" or self.reached)

    @property
    def ready(self) -> bool:
        """/readyz: the model is loaded, the server reached, and jobs are taken."""
        return self.state in ("ready", "busy") and self.reached

    def report(self) -> dict[str, Any]:
        """The body of the health answers."""
        return {
            "alive": self.alive,
            "ready": self.ready,
            "state": self.state,
            "degraded": self.degraded,
            "server_silent_s": round(self._silence_s(), 3),
        }
