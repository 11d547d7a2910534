"""When the engine's thread launches a decode step: late, but before the device is idle.

A device that computes ahead gets a step while it computes the one before. A prompt that arrives
after the launch waits for both, so the launch is delayed while the device has enough work.
"""

from collections import deque

from worker.model import StepWait

MARGIN_S = 0.002
"""The device's work that a delayed launch leaves: Python needs up to so long for one beside a flush
of the event loop."""
REMEMBERED = 4
"""Steps whose shortest determines the delay."""
_LATE_S = 0.0001
"""A step that waits less for the device was launched too late, or is too short to be delayed."""


class Pacing:
    """Derives the delay from the time that the device has taken for past steps.

    A step of the device begins when the one before ends, which is when the host's wait for that one
    ends. What the host does between two waits is part of the step, but for the wait: a launch that
    begins that time and MARGIN_S earlier than the step ends is in time. Times are of
    `time.monotonic`. After a launch that was too late, the next ones are not delayed.
    """

    def __init__(self) -> None:
        self._device_began_at: float | None = None
        self._spare_s: deque[float] = deque(maxlen=REMEMBERED)

    @property
    def due_at(self) -> float:
        """When to begin the next step; 0 for at once."""
        if self._device_began_at is None or len(self._spare_s) < REMEMBERED:
            return 0.0
        return self._device_began_at + min(self._spare_s) - MARGIN_S

    def stepped(self, began_at: float, wait: StepWait | None) -> None:
        """Note a step that began at `began_at`, and its wait for the device."""
        device_began_at, self._device_began_at = self._device_began_at, None if wait is None else wait.ended_at
        if wait is None:
            return
        if wait.ended_at - wait.began_at < _LATE_S:
            self._spare_s.clear()
        elif device_began_at is not None:
            self._spare_s.append(began_at - device_began_at + wait.ended_at - wait.began_at)
