"""What was asked in a run and what its readers heard: written by the orchestrators, read by the checker."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from tests.chaos.questions import Asked
from worker.jobs.events import Token
from worker.jobs.reader import StreamEvent

LOSS_S = 3.0
"""What was sent longer than this before a loss is safe: the server writes each second."""


@dataclass
class Job:
    """One job, as its submitter knows it."""

    job_id: str
    pool: str
    kind: str
    asked: Asked
    heard: dict[int, int] = field(default_factory=dict)
    """Token ids by index, over all passes of its reader."""
    last: StreamEvent | None = None
    """Its terminal event."""
    wrong: list[str] = field(default_factory=list)
    """What its reader found wrong."""
    sent: float = math.inf
    """When it was last submitted, on the monotonic clock."""
    perhaps_lost: bool = False
    """The server lost its last second soon after: it may have forgotten the job, answered or not."""


@dataclass
class Garbage:
    """A payload that names no job; `sent` and `perhaps_lost` as a job's."""

    pool: str
    payload: bytes
    sent: float = math.inf
    perhaps_lost: bool = False


@dataclass
class Ledger:
    """Everything that was asked."""

    jobs: list[Job] = field(default_factory=list)
    garbage: list[Garbage] = field(default_factory=list)
    losses: int = 0
    """How often the server has lost its last second: readers may hear a part again then, and jobs may be gone."""
    submitted_again: int = 0
    repeated: int = 0
    """Tokens heard again after such a loss."""
    reread: int = 0
    """Readers that had to begin anew after such a loss."""
    rewinds: int = 0
    """Readers that went back to an earlier entry, of their own accord."""

    def lose_last_second(self) -> None:
        """Note a loss, before the server answers again."""
        self.losses += 1
        for each in (*self.jobs, *self.garbage):
            each.perhaps_lost = each.perhaps_lost or time.monotonic() - each.sent < LOSS_S


class Pass:
    """One pass of a reader over a job's events, from an entry on: no gap, no token twice, every id as heard before.

    `losses` is how often the server had lost writes when the reader last began at the start.
    """

    def __init__(self, job: Job, ledger: Ledger, losses: int) -> None:
        self._job = job
        self._ledger = ledger
        self._losses = losses
        self._next: int | None = None

    @property
    def disturbed(self) -> bool:
        """Whether the server has lost writes since then: the reader's entries may not be the server's any more."""
        return self._ledger.losses != self._losses

    def hear(self, item: StreamEvent) -> bool:
        """Take one event; False where the reader must begin anew, since the server has lost what lay between."""
        if not isinstance(item.event, Token):
            return True
        token, expected = item.event, self._next
        if expected is not None and token.i > expected and self.disturbed:
            return False
        if expected is not None and token.i < expected and self.disturbed:
            self._ledger.repeated += 1
        elif expected not in (None, token.i):
            self._job.wrong.append(f"a reader heard token {token.i} where {expected} is the next")
        if self._job.heard.setdefault(token.i, token.id) != token.id:
            self._job.wrong.append(f"a reader heard token {token.i} as {self._job.heard[token.i]}, then {token.id}")
        self._next = token.i + 1
        return True

    def over_unheard(self) -> None:
        """The events ended without a terminal one."""
        if not self.disturbed:
            self._job.wrong.append("the events ended without a terminal one")
