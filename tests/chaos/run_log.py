"""Record of a run, written by its orchestrators: jobs submitted and tokens received."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.chaos.workload import Case
from worker.jobs.events import Token
from worker.jobs.reader import StreamEvent


@dataclass
class Job:
    """One job from its submitter's side."""

    job_id: str
    queue: str
    kind: str
    case: Case
    received: dict[int, int] = field(default_factory=dict)
    """Token ids by index, from all passes of its reader."""
    last: StreamEvent | None = None
    """Its terminal event."""
    problems: list[str] = field(default_factory=list)
    """Violations found by its reader."""
    sent: float = math.inf
    """Unix time at which the last submission was acknowledged."""
    maybe_lost: bool = False
    """The server lost what it wrote then: the job may be lost, finished or not."""


@dataclass
class Garbage:
    """A payload without a job id; `sent` and `maybe_lost` as in `Job`."""

    queue: str
    payload: bytes
    sent: float = math.inf
    maybe_lost: bool = False
    entries: int = 0
    """Number of calls that have added it: a call is repeated after a lost reply."""


@dataclass
class RunLog:
    """All jobs and unreadable payloads, and counts of what readers did."""

    jobs: list[Job] = field(default_factory=list)
    garbage: list[Garbage] = field(default_factory=list)
    losses: int = 0
    """Number of times that the server lost its last writes."""
    losing: bool = False
    """Whether the server is losing writes at this moment."""
    submitted_again: int = 0
    repeated: int = 0
    """Tokens received again after such a loss."""
    reread: int = 0
    """Readers that restarted after such a loss."""
    rewinds: int = 0
    """Times that a reader went back to an earlier entry on purpose."""
    problems: list[str] = field(default_factory=list)
    """Violations that concern no job."""

    def lose_writes(self, since: float) -> None:
        """Record that the server lost what it wrote from Unix time `since` on.

        Call it before the server restarts.
        """
        self.losses += 1
        for each in (*self.jobs, *self.garbage):
            each.maybe_lost = each.maybe_lost or each.sent >= since

    @contextlib.contextmanager
    def losing_writes(self) -> Iterator[None]:
        """Record that the server loses everything at some time in the block."""
        self.losing = True
        try:
            yield
        finally:
            self.lose_writes(-math.inf)
            self.losing = False


class ReadPass:
    """One pass of a reader over a job's events from one entry on.

    Checks that there is no gap and no repetition, and that ids equal those of earlier passes.
    `losses` is `RunLog.losses` at the time when the reader last started from the beginning.
    """

    def __init__(self, job: Job, run_log: RunLog, losses: int) -> None:
        self._job = job
        self._run_log = run_log
        self._losses = losses
        self._next: int | None = None

    @property
    def writes_lost(self) -> bool:
        """Whether the server has lost writes since: the reader may have seen other entries."""
        return self._run_log.losing or self._run_log.losses != self._losses

    def receive(self, item: StreamEvent) -> bool:
        """Check one event. Returns False if the reader must restart because of lost writes."""
        if not isinstance(item.event, Token):
            return True
        token, expected = item.event, self._next
        if expected is not None and token.i > expected and self.writes_lost:
            return False
        if expected is not None and token.i < expected and self.writes_lost:
            self._run_log.repeated += 1
        elif expected not in (None, token.i):
            self._job.problems.append(f"a reader received token {token.i} where {expected} is the next")
        if self._job.received.setdefault(token.i, token.id) != token.id:
            first = self._job.received[token.i]
            self._job.problems.append(f"a reader received token {token.i} as {first}, then {token.id}")
        self._next = token.i + 1
        return True

    def end(self, item: StreamEvent) -> bool:
        """Record the terminal event. Returns False if the reader must restart because of lost writes.

        After a loss, entry ids may denote other tokens: a reader that resumed at one may lack some.
        """
        received = sorted(self._job.received)
        complete = received == list(range(len(received)))
        if not complete and self.writes_lost:
            return False
        self._job.last = item
        if not complete:
            self._job.problems.append(f"its reader received tokens {received}")
        return True

    def ended_early(self) -> None:
        """Record that the events ended without a terminal one."""
        if not self.writes_lost:
            self._job.problems.append("the events ended without a terminal one")
