"""How a worker is seen and spoken to: its registration, its own event stream, the commands that operators send.

None of it decides what happens to a job: what is lost here is lost, and nothing waits for it. Jobs are
`transport.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

from worker.jobs.events import Envelope, Event, encode_event
from worker.jobs.keys import CONTROL, START, worker_events_key
from worker.jobs.lease import Policy
from worker.jobs.protocol import Trace
from worker.jobs.streams import Disconnected, Streams, retry_until_connected

READ_BLOCK_MS = 1000


@dataclass(frozen=True, slots=True)
class Command:
    """A line on the control stream: cancel the job, or drain the worker, named `target`."""

    do: Literal["cancel", "drain"]
    target: str


class Presence:
    """The worker `worker_id`, as operators see it; `clock` gives seconds since 1970."""

    def __init__(
        self, streams: Streams, worker_id: str, policy: Policy, clock: Callable[[], float] = time.time
    ) -> None:
        self._streams = streams
        self._worker_id = worker_id
        self._policy = policy
        self._clock = clock
        self._heard = START

    async def open(self) -> None:
        """Commands count from now on."""
        self._heard = await retry_until_connected(self._streams.last_id, CONTROL)

    async def publish(
        self, event: Event, job_id: str | None = None, epoch: int = 0, trace: Trace | None = None
    ) -> None:
        """Add to the worker's own stream, which keeps its newest events; the rest is given for a copy of a job's."""
        kind, packed = encode_event(event, self.envelope(job_id, epoch, trace))
        key, ttl_ms = worker_events_key(self._worker_id), int(self._policy.retention_s * 1000)
        with contextlib.suppress(Disconnected):
            await self._streams.add(key, {"type": kind.encode(), "p": packed}, self._policy.worker_events, ttl_ms)

    def envelope(self, job_id: str | None, epoch: int, trace: Trace | None) -> Envelope:
        """What an event of this worker carries, written now."""
        return Envelope(
            job_id=job_id,
            epoch=epoch,
            ts_ms=int(self._clock() * 1000),
            worker_id=self._worker_id,
            correlation_id=trace.correlation_id if trace else None,
            traceparent=trace.traceparent if trace else None,
        )

    async def heartbeat(self, status: Mapping[str, str]) -> None:
        """Register, and write the status hash, which ends `status_ttl_s` after the last one."""
        with contextlib.suppress(Disconnected):
            await self._streams.put_status(self._worker_id, status, int(self._policy.status_ttl_s * 1000))

    async def commands(self) -> AsyncIterator[Command]:
        """Commands to any worker since `open`, for ever."""
        while True:
            try:
                records = await self._streams.read(CONTROL, self._heard, READ_BLOCK_MS)
            except Disconnected:
                await asyncio.sleep(self._policy.scan_s)
                continue
            for self._heard, fields in records:
                do, target = (fields.get(name, b"").decode(errors="replace") for name in ("do", "target"))
                if do in ("cancel", "drain"):
                    yield Command(cast("Literal['cancel', 'drain']", do), target)

    async def close(self) -> None:
        """Unregister."""
        await self._streams.drop_status(self._worker_id)
