"""Publishes the due tokens of all running jobs together, in one round trip every `flush_ms`.

A job's own task would need one wake-up and one call for each batch of tokens. `FlushLoop` writes
the batches of all jobs by one pipelined call instead. A job whose batch was not written as expected
repeats it in its own task, which handles a fence, lost writes and a lost connection. With one due
job that task makes the call.
"""

import asyncio
from collections.abc import Iterable
from typing import Protocol

from worker.jobs.lease import Lease
from worker.jobs.transport import Transport


class TokenSource(Protocol):
    """A running job with unpublished tokens; implemented by `Generation`."""

    @property
    def lease(self) -> Lease:
        """The lease to publish under."""

    @property
    def idle(self) -> bool:
        """Whether no append of the job is in flight or about to begin."""

    def stage(self) -> bool:
        """Encode what is due into the lease's log; returns whether that succeeded."""

    def request_append(self) -> None:
        """Have the job's own task publish what is due or was not written."""


class FlushLoop:
    """The unpublished tokens of a worker. Used on the event loop."""

    def __init__(self, transport: Transport, flush_ms: float) -> None:
        self._transport = transport
        self._flush_s = flush_ms / 1000
        self._due: dict[TokenSource, None] = {}
        self._timer: asyncio.Handle | None = None
        self._at_once = False
        self._writes: set[asyncio.Task[None]] = set()

    def add(self, source: TokenSource, *, at_once: bool = False) -> None:
        """Publish the tokens of `source` within `flush_ms`, or in the loop's next iteration."""
        self._due[source] = None
        if self._timer is not None and at_once > self._at_once:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            loop, self._at_once = asyncio.get_running_loop(), at_once
            self._timer = loop.call_soon(self._flush) if at_once else loop.call_later(self._flush_s, self._flush)

    def discard(self, source: TokenSource) -> None:
        """Publish nothing more of `source`."""
        self._due.pop(source, None)

    def _flush(self) -> None:
        due, self._due, self._timer = self._due, {}, None
        together = [source for source in due if source.idle] if len(due) > 1 else []
        if len(together) > 1:
            for source in together:
                del due[source]
            self._write(source for source in together if source.stage())
        for source in due:
            source.request_append()

    def _write(self, staged: Iterable[TokenSource]) -> None:
        task = asyncio.create_task(self._append(list(staged)))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def _append(self, sources: list[TokenSource]) -> None:
        written: list[bool] = []
        try:
            written = await self._transport.append_staged([source.lease for source in sources])
        finally:
            for n, source in enumerate(sources):
                if n >= len(written) or not written[n]:
                    source.request_append()
