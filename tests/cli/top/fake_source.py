"""A `Source` without a server: returns what a test has set, and records the commands."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from worker.cli.top.snapshot import JobRow, LetterRow, QueueRow, Snapshot, WorkerRow


def status(**fields: object) -> dict[str, str]:
    """A status hash as a worker with 80 GB publishes it."""
    gigabyte = 10**9
    values: dict[str, object] = {
        "state": "busy",
        "model": "llama",
        "queue": "default",
        "host": "host",
        "pid": 7,
        "version": "0.3.0",
        "device": "H100",
        "degraded": 0,
        "jobs": 12,
        "running": 3,
        "max_running": 8,
        "waiting": 1,
        "preempted": 2,
        "kv_blocks_used": 25,
        "kv_blocks": 100,
        "tokens_per_second": 1234.5,
        "ttft_p50_s": 0.012,
        "ttft_p95_s": 0.25,
        "vram_weights": 20 * gigabyte,
        "vram_kv": 40 * gigabyte,
        "vram_activations": gigabyte,
        "vram_workspace": gigabyte,
        "vram_runtime": gigabyte,
        "vram_free": 17 * gigabyte,
        "started_ms": 1000,
        "heartbeat_s": 5.0,
        "last_errors": "[]",
    }
    return {name: str(value) for name, value in (values | fields).items()}


def worker(name: str = "gpu-0", silent_s: float = 0.0, **fields: object) -> WorkerRow:
    return WorkerRow.of(name, status(**fields), 61_000, silent_s)


def jobs(count: int, running: int = 0, first: int = 0, queue: str = "default") -> list[JobRow]:
    return [
        JobRow(queue, f"{n + 1}-0", f"job-{n}", *(("running", "gpu-0") if n < running else ("waiting", "")), 100.0, 0)
        for n in range(first, first + count)
    ]


def letter(job_id: str, last_error: str = "INTERNAL", queue: str = "default") -> LetterRow:
    return LetterRow(queue, f"{len(job_id)}-0", job_id, "DEAD_LETTERED", 3, last_error, 30.0)


def snapshot(**fields: Any) -> Snapshot:
    """One queue and one worker, unless the fields say otherwise."""
    rows = fields.get("jobs", [])
    running = sum(job.state == "running" for job in rows)
    queue = QueueRow("default", len(rows) - running, running, 100.0 if rows else None, len(fields.get("letters", ())))
    base = Snapshot(now_ms=int(time.time() * 1000), queues=[queue], workers=[worker()])
    return replace(base, **fields)


class FakeSource:
    """Set `shown` to change what it returns, or `error` to have readings fail."""

    address = "redis://fake:6379"

    def __init__(self, shown: Snapshot) -> None:
        self.shown = shown
        self.error: Exception | None = None
        self.commands: list[tuple[str, ...]] = []
        self.outcome: Callable[[], str] = lambda: "cancelled"

    async def read(self) -> Snapshot:
        if self.error is not None:
            raise self.error
        return self.shown

    async def drain(self, worker: str) -> None:
        self.commands.append(("drain", worker))
        self.outcome()

    async def cancel(self, queue: str, job_id: str) -> str:
        self.commands.append(("cancel", queue, job_id))
        return self.outcome()

    async def retry(self, queue: str, entry_id: str) -> str:
        self.commands.append(("retry", queue, entry_id))
        return self.outcome()
