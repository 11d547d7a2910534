"""Parameters of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.schedule import Fault
from tests.chaos.workload import QUEUES


@dataclass(frozen=True)
class Plan:
    """Parameters of a run."""

    seed: int
    seconds: float
    faults: list[Fault]
    """Of processes, one after another."""
    network_faults: list[Fault] = field(default_factory=list)
    """Of links, beside these."""
    fenced: bool = True
    workers: int = 2
    """For each queue."""
    orchestrators: int = 2
    concurrency: int = 6
    """Running jobs of each orchestrator."""
    cases: int = 12
    max_running: int = 1
    """Jobs that a worker runs at once."""
    other_release: Path | None = None
    """A checkout of another release, which every second worker runs."""

    def worker_names(self, queue: str) -> list[str]:
        """Names of the workers of a queue."""
        return [f"{queue}{n}" for n in range(self.workers)]

    def orchestrator_names(self, queue: str) -> list[str]:
        """Names of the orchestrators of a queue."""
        return [f"{queue}{self.seed}o{n}" for n in range(self.orchestrators)]

    def names(self) -> list[str]:
        """Names of all processes that connect to the server."""
        return [name for queue in QUEUES for name in self.worker_names(queue) + self.orchestrator_names(queue)]
