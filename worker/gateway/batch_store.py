"""Batches in Redis: their description, the results of their lines, and who runs them.

| status | set by |
| --- | --- |
| `validating` | the gateway that received the batch |
| `in_progress`, `finalizing` | the owner of the lease |
| `completed`, `failed`, `expired`, `cancelled` | the owner of the lease |
| `cancelling` | not stored: reported for a batch with `cancelling_at` that has not ended |

The first result of a line is kept; later results of the same line are ignored. Read
`batch_runner.py` next.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Self

from worker.gateway.errors import ApiError
from worker.jobs.documents import (
    ACTIVE_BATCHES,
    Documents,
    batch_key,
    batch_lease_key,
    batch_results_key,
    batches_key,
)

_SPARE_RESULTS_MS = 600_000
OVER = ("completed", "failed", "expired", "cancelled")
_TIMES = (
    *("created_at", "in_progress_at", "expires_at", "finalizing_at", "completed_at", "failed_at", "expired_at"),
    *("cancelling_at", "cancelled_at"),
)


@dataclass(slots=True)
class Batch:
    """The description of a batch. Times in seconds since 1970."""

    id: str
    tenant: str
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_s: int | None = None
    key_digest: str | None = None
    """SHA-256 of the API key that created the batch, whose models and rates apply to its lines."""
    status: str = "validating"
    times: dict[str, int] = field(default_factory=dict)
    total: int = 0
    completed: int = 0
    failed: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: list[dict[str, Any]] = field(default_factory=list)
    """Mistakes in the input file, in OpenAI's form."""

    @property
    def is_over(self) -> bool:
        """Whether no more lines are run."""
        return self.status in OVER

    @property
    def is_late(self) -> bool:
        """Whether its completion window has passed."""
        return time.time() >= self.times["expires_at"]

    @property
    def is_cancelling(self) -> bool:
        """Whether its cancellation was requested."""
        return "cancelling_at" in self.times

    def to_api(self) -> dict[str, Any]:
        """OpenAI's batch object."""
        names = ("id", "endpoint", "input_file_id", "completion_window", "metadata", "output_file_id", "error_file_id")
        return {
            "object": "batch",
            **{name: getattr(self, name) for name in names},
            "status": "cancelling" if self.is_cancelling and not self.is_over else self.status,
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            **{name: self.times.get(name) for name in _TIMES},
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
        }

    def to_fields(self) -> dict[str, str]:
        """The fields of its hash that change together. Others write the times and counts alone."""
        whole = {name: getattr(self, name) for name in _STORED}
        return {"batch": json.dumps(whole)}  # ASCII: JSON escapes also encode lone surrogates

    @classmethod
    def of(cls, fields: Mapping[str, bytes]) -> Self:
        """Read a stored description."""
        counts = {name: int(fields.get(name, b"0")) for name in ("completed", "failed")}
        times = {name: int(fields[name]) for name in _TIMES if name in fields}
        return cls(**json.loads(fields["batch"]) | counts, times=times)


_STORED = (
    *("id", "tenant", "endpoint", "input_file_id", "completion_window", "metadata", "output_expires_s"),
    *("key_digest", "status", "total", "output_file_id", "error_file_id", "errors"),
)


class BatchStore:
    """The batches of all tenants; they expire `retention_s` after the last change of a status."""

    def __init__(self, documents: Documents, retention_s: float) -> None:
        self._documents = documents
        self._retention_ms = int(retention_s * 1000)

    async def create(self, batch: Batch, window_s: int) -> Batch:
        """Store a new batch under a new id and list it for the runners."""
        now_ms = int(time.time() * 1000)
        now_s = now_ms // 1000
        batch.id = f"batch_{uuid.uuid4().hex}"
        batch.times = {"created_at": now_s, "expires_at": now_s + window_s}
        await self.save(batch)
        await self._documents.enlist(batches_key(batch.tenant), batch.id, now_ms, self._retention_ms)
        await self._documents.enlist(ACTIVE_BATCHES, batch.id, now_ms, self._retention_ms)
        return batch

    async def save(self, batch: Batch) -> None:
        """Write the description, without the counts and the time of a requested cancellation."""
        times = {name: str(value) for name, value in batch.times.items() if name != "cancelling_at"}
        await self._documents.put(batch_key(batch.id), batch.to_fields() | times, self._retention_ms)

    async def read(self, batch_id: str) -> Batch | None:
        """The batch, None if it is unknown or has expired."""
        fields = await self._documents.get(batch_key(batch_id))
        return Batch.of(fields) if "batch" in fields else None

    async def find(self, batch_id: str, tenant: str) -> Batch:
        """A tenant's batch. Raises status 404."""
        batch = await self.read(batch_id)
        if batch is None or batch.tenant != tenant:
            message = f"no batch has the id {batch_id}"
            raise ApiError(HTTPStatus.NOT_FOUND, message, code="batch_not_found", param="batch_id")
        return batch

    async def ids(self, tenant: str) -> list[str]:
        """The ids of a tenant's batches, the newest first."""
        return await self._documents.listed(batches_key(tenant))

    async def request_cancel(self, batch: Batch) -> None:
        """Record that a batch is to be cancelled; its runner sees it."""
        await self._documents.put_once(batch_key(batch.id), "cancelling_at", str(int(time.time())))

    async def active(self) -> list[str]:
        """The ids of the batches that have not ended, the oldest first."""
        return (await self._documents.listed(ACTIVE_BATCHES))[::-1]

    async def close(self, batch_id: str) -> None:
        """Remove a batch from the active ones: it has ended, or its description has expired."""
        await self._documents.unlist(ACTIVE_BATCHES, batch_id)

    async def hold(self, batch_id: str, owner: str, ttl_s: float) -> bool:
        """Take or renew the lease of a batch; False if another runner has it."""
        return await self._documents.hold(batch_lease_key(batch_id), owner, int(ttl_s * 1000))

    async def release(self, batch_id: str, owner: str) -> None:
        """Give up the lease."""
        await self._documents.release(batch_lease_key(batch_id), owner)

    async def put_result(self, batch_id: str, line: int, result: bytes, *, succeeded: bool) -> None:
        """Put the result of a line, unless it has one, and count it."""
        key, marked = batch_results_key(batch_id), (b"+" if succeeded else b"-") + result
        if await self._documents.put_once(key, str(line), marked):
            await self._documents.expire(key, self._retention_ms)
            await self._documents.increment(batch_key(batch_id), "completed" if succeeded else "failed")

    async def count_results(self, batch: Batch) -> set[int]:
        """Return the lines that have a result, and correct the counts of the batch.

        A runner may have stopped between a result and its count.
        """
        key, lines = batch_results_key(batch.id), await self.lines_with_results(batch.id)
        batch.completed = 0
        for start in range(0, len(lines), 100):
            values = await self._documents.values(key, [str(line) for line in lines[start : start + 100]])
            batch.completed += sum(value is not None and value.startswith(b"+") for value in values)
        batch.failed = len(lines) - batch.completed
        counts = {"completed": str(batch.completed), "failed": str(batch.failed)}
        await self._documents.put(batch_key(batch.id), counts, self._retention_ms)
        return set(lines)

    async def lines_with_results(self, batch_id: str) -> list[int]:
        """The numbers of the lines that have a result."""
        return [int(line) for line in await self._documents.names(batch_results_key(batch_id))]

    async def results(self, batch: Batch, lines: range) -> list[tuple[bytes, bool]]:
        """Results and success of those of `lines` that have one."""
        values = await self._documents.values(batch_results_key(batch.id), [str(line) for line in lines])
        return [(value[1:], value.startswith(b"+")) for value in values if value is not None]

    async def expire_results(self, batch: Batch) -> None:
        """Have the results expire, later than a runner that has lost the lease may read them."""
        await self._documents.expire(batch_results_key(batch.id), _SPARE_RESULTS_MS)
