"""What `worker top` shows: queues, workers, jobs, dead letters and errors at one time.

`source.py` reads them from a server. Texts are untrusted and unescaped: whatever displays them must
neutralize control characters and markup (`format.py`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

PURPOSES = ("weights", "kv", "activations", "workspace", "runtime")
"""Purposes of device memory, in the order of a bar."""


@dataclass(frozen=True, slots=True)
class QueueRow:
    """A queue."""

    name: str
    waiting: int
    """Orphaned jobs included."""
    running: int
    oldest_s: float | None
    """Age of the oldest waiting job; None if none waits."""
    dead: int


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """A worker, by its status. A number is None if the worker has not published it."""

    id: str
    state: str
    model: str
    queue: str
    host: str
    pid: str
    version: str
    device: str
    degraded: bool
    running: int
    max_running: int | None
    waiting: int
    preempted: int
    jobs: int
    tokens_per_second: float | None
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    kv_blocks_used: int
    kv_blocks: int
    memory: Mapping[str, int]
    """Bytes by purpose; without `free`."""
    free: int
    uptime_s: float | None
    silent_s: float
    """Seconds for which its status has not changed."""
    stale: bool
    """Whether a heartbeat is overdue: the worker, or its connection, has probably died."""

    @classmethod
    def of(cls, worker: str, status: Mapping[str, str], now_ms: int, silent_s: float) -> Self:
        """Read a status hash; fields that are missing or malformed count as absent."""

        def number(name: str) -> float | None:
            try:
                value = float(status.get(name, ""))
            except ValueError:
                return None
            return value if 0 <= value < 2**63 else None

        def count(name: str) -> int:
            return int(number(name) or 0)

        started_ms, lanes = number("started_ms"), number("max_running")
        return cls(
            id=worker,
            state=status.get("state", ""),
            model=status.get("model", ""),
            queue=status.get("queue", ""),
            host=status.get("host", ""),
            pid=status.get("pid", ""),
            version=status.get("version", ""),
            device=status.get("device", ""),
            degraded=status.get("degraded") == "1",
            running=count("running"),
            max_running=None if lanes is None else int(lanes),
            waiting=count("waiting"),
            preempted=count("preempted"),
            jobs=count("jobs"),
            tokens_per_second=number("tokens_per_second"),
            ttft_p50_s=number("ttft_p50_s"),
            ttft_p95_s=number("ttft_p95_s"),
            kv_blocks_used=count("kv_blocks_used"),
            kv_blocks=count("kv_blocks"),
            memory={purpose: count(f"vram_{purpose}") for purpose in PURPOSES},
            free=count("vram_free"),
            uptime_s=None if started_ms is None else max(0.0, (now_ms - started_ms) / 1000),
            silent_s=silent_s,
            stale=silent_s > overdue_s(number("heartbeat_s")),
        )


def overdue_s(heartbeat_s: float | None) -> float:
    """Seconds without a heartbeat after which a worker counts as stale.

    The server forgets it after 15 s.
    """
    return min(12.0, 1.0 + 1.3 * (5.0 if heartbeat_s is None else heartbeat_s))


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job in a queue."""

    queue: str
    entry_id: str
    job_id: str | None
    """None if its payload has no readable id."""
    state: str
    """`running`, `waiting`, or `orphaned`: its worker has not renewed it for a lease."""
    worker: str
    """Empty unless it was delivered."""
    age_s: float
    deliveries: int


@dataclass(frozen=True, slots=True)
class LetterRow:
    """A dead letter."""

    queue: str
    entry_id: str
    job_id: str
    reason: str
    attempts: int
    last_error: str
    age_s: float


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """An error that a worker has reported."""

    ts_ms: int
    worker: str
    job_id: str
    """Empty for an error of the worker itself."""
    code: str
    message: str

    @classmethod
    def all_of(cls, worker: str, status: Mapping[str, str]) -> list[Self]:
        """The errors in a status hash; malformed ones are left out."""
        try:
            listed: Any = json.loads(status.get("last_errors", "[]"))
        except (ValueError, RecursionError):
            return []
        found = []
        for each in listed if isinstance(listed, list) else ():
            if isinstance(each, dict) and type(ts_ms := each.get("ts_ms")) is int and 0 <= ts_ms < 2**53:
                texts = (str(each.get(name) or "") for name in ("job_id", "code", "message"))
                found.append(cls(ts_ms, worker, *texts))
        return found


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One reading of a server."""

    now_ms: int = 0
    """The server's clock."""
    queues: list[QueueRow] = field(default_factory=list)
    hidden_queues: int = 0
    """Queues that were not read because there are too many."""
    workers: list[WorkerRow] = field(default_factory=list)
    jobs: list[JobRow] = field(default_factory=list)
    """Running ones first, then by age, oldest first; at most LISTED of each queue."""
    letters: list[LetterRow] = field(default_factory=list)
    """Oldest first, at most LETTERS of each queue."""
    errors: list[ErrorRow] = field(default_factory=list)
    """Newest first."""

    @property
    def jobs_total(self) -> int:
        """Jobs in the queues, waiting and running, listed or not."""
        return sum(queue.waiting + queue.running for queue in self.queues)

    @property
    def letters_total(self) -> int:
        """Dead letters, listed or not."""
        return sum(queue.dead for queue in self.queues)
