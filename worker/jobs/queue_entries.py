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
        count = int(attempts) if attempts.isascii() and attempts.isdigit() else 0
        return cls(entry_id, job_id, reason, count, last_error, fields.get("p", b""))


@dataclass(frozen=True, slots=True)
class QueueEntry:
    """A job in the queue: waiting, or running if `worker` is set."""

    entry_id: str
    job_id: str | None
    """None if the payload has no readable id."""
    worker: str | None
    deliveries: int


def retry_id(job_id: str) -> str:
    """The id under which a dead-lettered job is resubmitted."""
    match = re.fullmatch(r"(.*)\.r(\d+)", job_id)
    base, count = (match[1], int(match[2])) if match else (job_id, 0)
    suffix = f".r{count + 1}"
    return base[: 128 - len(suffix)] + suffix
