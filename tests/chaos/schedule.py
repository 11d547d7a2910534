"""What is done to the processes of a run, and when: a function of the seed alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

BLOWS: Mapping[str, float] = {
    "kill": 50,  # SIGKILL
    "pause": 22,  # SIGSTOP past the lease, then SIGCONT
    "term": 14,  # SIGTERM: it hands its job back, or ends it within the grace period
    "kill all": 3,
    "server": 4,  # SIGKILL of the server, which starts again with all that it wrote
    "lost second": 4,  # the same, and what it wrote in its last second is gone
}
"""What may be done, with weights."""


@dataclass(frozen=True)
class Blow:
    """One disturbance, `at` seconds after the start."""

    at: float
    kind: str
    pool: int
    """0 or 1: whose worker it meets."""
    busy: bool
    """A worker that has a job, if there is one; else any."""
    pause: float
    """How many leases long a paused worker is stopped."""


def schedule(seed: int, seconds: float, gap_s: float, blows: Mapping[str, float] = BLOWS) -> list[Blow]:
    """Blows through `seconds`, one each `gap_s` on average."""
    random = Random(f"schedule {seed}")
    kinds, weights = list(blows), list(blows.values())
    planned: list[Blow] = []
    at = gap_s
    while at < seconds:
        kind = random.choices(kinds, weights)[0]
        planned.append(Blow(at, kind, random.randrange(2), random.random() < 0.85, random.uniform(1.3, 2.5)))
        at += random.uniform(0.3, 1.7) * gap_s
    return planned
