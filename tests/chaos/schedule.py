"""The faults of a run and their times, a function of the seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random

FAULT_WEIGHTS: Mapping[str, float] = {
    "kill": 50,  # SIGKILL
    "pause": 22,  # SIGSTOP past the lease, then SIGCONT
    "term": 14,  # SIGTERM: the worker finishes or releases its job within the grace period
    "kill all": 3,
    "server": 4,  # SIGKILL of the server, which restarts with all its data
    "lost second": 4,  # the same, without what it wrote in its last second
    "too few replicas": 2,  # it refuses writes past the lease: NOREPLICAS
    "out of memory": 2,  # OOM
    "read only": 2,  # READONLY
    "busy": 2,  # a script runs: BUSY, for every command
}
"""Kinds of faults and their relative frequency."""
_COMPLETE_S = 90.0
"""A schedule of this length or more has every kind."""
_AT_LEAST = {"lost second": 3}
"""How often such a schedule has a kind, by default once. Much depends on what is lost."""
REFUSALS = frozenset({"too few replicas", "out of memory", "read only", "busy"})


@dataclass(frozen=True)
class Fault:
    """One fault, `at` seconds after the start."""

    at: float
    kind: str
    queue: int
    """Index of the queue whose worker is affected."""
    busy: bool
    """Prefer a worker that has a job."""
    pause: float
    """Length of a pause or a refusal, in leases."""


def schedule(seed: int, seconds: float, gap_s: float, weights: Mapping[str, float] = FAULT_WEIGHTS) -> list[Fault]:
    """Plan faults for `seconds`, one per `gap_s` on average."""
    random = Random(f"schedule {seed}")
    kinds = list(weights)
    planned: list[Fault] = []
    at = gap_s
    while at < seconds:
        kind = random.choices(kinds, list(weights.values()))[0]
        planned.append(Fault(at, kind, random.randrange(2), random.random() < 0.85, random.uniform(1.3, 2.5)))
        at += random.uniform(0.3, 1.7) * gap_s
    if seconds >= _COMPLETE_S:
        _complete(planned, weights, random)
    return planned


def _complete(planned: list[Fault], weights: Mapping[str, float], random: Random) -> None:
    """Change faults of the most frequent kind into those that are too few.

    Only the first two thirds count: a run may end before the last faults.
    """
    early, frequent = 2 * len(planned) // 3, max(weights, key=lambda kind: weights[kind])
    for kind in weights:
        missing = _AT_LEAST.get(kind, 1) - sum(fault.kind == kind for fault in planned[:early])
        replaceable = [n for n in range(early) if planned[n].kind == frequent]
        for n in random.sample(replaceable, min(max(0, missing), len(replaceable))):
            planned[n] = replace(planned[n], kind=kind)
