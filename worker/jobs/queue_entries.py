"""Entries of a queue and of its dead letters, as a client lists them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from worker.jobs.streams import Record


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An entry of the dead-letter stream."""

    entry_id: str
    job_id: str
    reason: str
    attempts: int
    last_error: str
    payload: bytes

    @classmethod
    def of(cls, record: Record) -> DeadLetter:
        """Decode an entry of the dead-letter stream."""
        entry_id, fields = record
        names = ("job_id", "reason", "attempts", "last_error")
        job_id, reason, attempts, last_error = (fields.get(name, b"").decode(errors="replace") for name in names)
        count = int(attempts) if re.fullmatch("[0-9]{1,18}", attempts) else 0
        return cls(entry_id, job_id, reason, count, last_error, fields.get("p", b""))


@dataclass(frozen=True, slots=True)
class QueueEntry:
    """A job in the queue. `worker` is set if it was delivered; see `entry_state`."""

    entry_id: str
    job_id: str | None
    """None if the payload has no readable id."""
    worker: str | None
    deliveries: int
    idle_ms: int | None = None
    """Since its worker received or renewed it; None if no worker has it."""


def entry_state(idle_ms: int | None, lease_ms: float) -> str:
    """`waiting` (no worker has it), `running`, or `orphaned`: not renewed for a lease.

    `QueueDepth` counts orphaned jobs as waiting: another worker takes them over.
    """
    if idle_ms is None:
        return "waiting"
    return "running" if idle_ms < lease_ms else "orphaned"


def retry_id(job_id: str) -> str:
    """The id under which a dead-lettered job is resubmitted."""
    match = re.fullmatch(r"(.*)\.r(\d+)", job_id)
    base, count = (match[1], int(match[2])) if match else (job_id, 0)
    suffix = f".r{count + 1}"
    return base[: 128 - len(suffix)] + suffix
