"""The faults of a run and their times, a function of the seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random

FAULT_WEIGHTS: Mapping[str, float] = {
    "kill": 50,  # SIGKILL
    "pause": 30,  # SIGSTOP past the lease, then SIGCONT
    "term": 8,  # SIGTERM: the worker finishes or releases its job within the grace period
    "kill all": 3,
    "server": 4,  # SIGKILL of the server, which restarts with all its data
    "loading": 1,  # the same, and it takes longer than a lease to load its data: LOADING
    "lost second": 3,  # SIGKILL, and it restarts without what it wrote in its last second
    "fail over": 1,  # a replica with all its data takes over; READONLY until clients are directed there
    "flush": 1,  # FLUSHALL
    "close clients": 2,  # CLIENT KILL of all connections
    "too few replicas": 1,  # it refuses writes past the lease: NOREPLICAS
    "out of memory": 1,  # OOM
    "read only": 1,  # READONLY
    "busy": 1,  # a script runs: BUSY, for every command
    "server clock": 2,  # the wall clock of the server is set an hour forward or back
    "worker clock": 2,  # that of a worker
}
"""Kinds of faults of processes and their relative frequency."""
_COMPLETE_S = 90.0
"""A schedule of this length or more has every kind."""
_AT_LEAST = {"lost second": 3}
"""How often such a schedule has a kind, by default once. Much depends on what is lost."""
REFUSALS = frozenset({"too few replicas", "out of memory", "read only", "busy"})
SERVER_FAULTS = frozenset(FAULT_WEIGHTS) - {"kill", "pause", "term", "kill all", "worker clock"}


@dataclass(frozen=True)
class Fault:
    """One fault, `at` seconds after the start."""

    at: float
    kind: str
    queue: int
    """Index of the queue whose worker is affected."""
    busy: bool
    """Prefer a worker that has a job. A network fault affects all links if not."""
    pause: float
    """Length of a pause, a refusal or a network fault, in leases."""


def schedule(seed: int, seconds: float, gap_s: float, weights: Mapping[str, float] = FAULT_WEIGHTS) -> list[Fault]:
    """Plan faults of these kinds for `seconds`, one per `gap_s` on average."""
    random = Random(f"schedule {seed} {' '.join(weights)}")
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
    """Change faults of the kind that is the most frequent into those that are too few.

    Only the first two thirds count: a run may end before the last faults.
    """
    early = 2 * len(planned) // 3
    for kind in weights:
        counts = Counter(fault.kind for fault in planned[:early])
        while counts[kind] < _AT_LEAST.get(kind, 1) < counts.most_common(1)[0][1]:
            frequent = counts.most_common(1)[0][0]
            n = random.choice([n for n in range(early) if planned[n].kind == frequent])
            planned[n] = replace(planned[n], kind=kind)
            counts += Counter({kind: 1})
            counts[frequent] -= 1
