"""When the engine's thread launches a decode step: late, but before the device is idle.

A device that computes ahead gets a step while it computes the one before. A prompt that arrives
after the launch waits for both, so the launch is delayed while the device has enough work.
"""

from collections import deque

MARGIN_S = 0.002
"""The device's work that a delayed launch leaves: Python needs up to so long for one beside a flush
of the event loop."""
_LATE_S = 0.0001
"""A step that waits less for the device was launched too late, or is too short to be delayed."""
REMEMBERED = 4
"""Steps whose shortest determines the delay."""


class Pacing:
    """Derives the delay from the time for which past steps could have been delayed.

    Times are of `time.monotonic`. After a step that was launched too late, the next ones are not
    delayed.
    """

    def __init__(self) -> None:
        self._ended_at = self._delayed_s = 0.0
        self._launched_at: float | None = None
        self._spare_s: deque[float] = deque(maxlen=REMEMBERED)

    @property
    def due_at(self) -> float:
        """When to begin the next step."""
        if len(self._spare_s) < REMEMBERED:
            return self._ended_at
        return self._ended_at + max(0.0, min(self._spare_s) - MARGIN_S)

    def began(self, at: float) -> None:
        """Note that a step begins with its work on the host."""
        self._delayed_s = min(at, self.due_at) - self._ended_at  # any other delay has another cause
        self._launched_at = None

    def launched(self, at: float) -> None:
        """Note that the step begins to wait for the device; later calls of a step are ignored."""
        if self._launched_at is None:
            self._launched_at = at

    def ended(self, at: float) -> None:
        """Note the end of a step."""
        waited_s = 0.0 if self._launched_at is None else at - self._launched_at
        if waited_s < _LATE_S:
            self._spare_s.clear()
        else:
            self._spare_s.append(self._delayed_s + waited_s)
        self._ended_at = at
