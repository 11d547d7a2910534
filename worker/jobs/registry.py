"""A worker's registration: heartbeat and status, its own event stream, commands to it.

None of this affects the result of a job: writes that fail are dropped, and no job waits for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

from worker.config import LeaseSection
from worker.jobs.events import Envelope, Event, encode_event
from worker.jobs.keys import CONTROL, START, worker_events_key
from worker.jobs.streams import Disconnected, Streams, retry_until_connected

READ_BLOCK_MS = 1000
STATUS_TTL_S = 15.0
"""A worker without a heartbeat for this long is no longer listed."""
MAX_EVENTS = 10_000
"""Approximate number of events kept on a worker's own stream."""


@dataclass(frozen=True, slots=True)
class Command:
    """An entry of the control stream: cancel the job, or drain the worker, named `target`."""

    do: Literal["cancel", "drain"]
    target: str


class Registration:
    """The worker `worker_id` in the registry; `clock` returns seconds since 1970."""

    def __init__(
        self, streams: Streams, worker_id: str, lease: LeaseSection, clock: Callable[[], float] = time.time
    ) -> None:
        self._streams = streams
        self._worker_id = worker_id
        self._lease = lease
        self._clock = clock
        self._last_command_id = START

    async def open(self) -> None:
        """Start at the end of the control stream: earlier commands are ignored."""
        self._last_command_id = await retry_until_connected(self._streams.last_id, CONTROL)

    async def close(self) -> None:
        """Unregister."""
        await self._streams.drop_status(self._worker_id)

    async def publish(self, event: Event, envelope: Envelope | None = None) -> None:
        """Append to the worker's own stream; pass the envelope to copy a job's event."""
        envelope = envelope or Envelope(None, 0, int(self._clock() * 1000), self._worker_id)
        kind, packed = encode_event(event, envelope)
        key, ttl_ms = worker_events_key(self._worker_id), int(self._lease.retention_s * 1000)
        with contextlib.suppress(Disconnected):
            await self._streams.add(key, {"type": kind.encode(), "p": packed}, MAX_EVENTS, ttl_ms)

    async def heartbeat(self, status: Mapping[str, str]) -> None:
        """Register, and write the status hash, which expires after STATUS_TTL_S."""
        with contextlib.suppress(Disconnected):
            await self._streams.put_status(self._worker_id, status, int(STATUS_TTL_S * 1000))

    async def commands(self) -> AsyncIterator[Command]:
        """Yield commands to any worker that were sent since `open`. Never ends."""
        while True:
            try:
                records = await self._streams.read(CONTROL, self._last_command_id, READ_BLOCK_MS)
            except Disconnected:
                await asyncio.sleep(self._lease.scan_s)
                continue
            for self._last_command_id, fields in records:
                do, target = (fields.get(name, b"").decode(errors="replace") for name in ("do", "target"))
                if do in ("cancel", "drain"):
                    yield Command(cast("Literal['cancel', 'drain']", do), target)
