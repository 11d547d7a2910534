"""Publishes the due tokens of all running jobs together, in one round trip every `flush_ms`.

A job's own task would need one wake-up and one call for each batch of tokens. `FlushLoop` reads,
encodes and writes those of all jobs by one pipelined call instead, of which one is in flight. A job
whose batch was not written as expected repeats it in its own task, which handles a fence, lost
writes and a lost connection. With one due job that task makes the call.
"""

import asyncio
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
        """Encode what is due into the lease's log; returns whether to write it here."""

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
        self._write: asyncio.Task[None] | None = None
        self._late = False
        """Whether a flush has waited for the call in flight."""

    def add(self, source: TokenSource, *, at_once: bool = False) -> None:
        """Publish the tokens of `source` within `flush_ms`, or in the loop's next iteration.

        If a call is in flight then, they are published after it.
        """
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
        if self._timer is not None:
            self._timer.cancel()  # if `_written` calls: this flush has the timer's sources
            self._timer = None
        if self._write is not None:
            self._late = True
            return
        due, self._due = self._due, {}
        if len(due) > 1:
            self._write = asyncio.create_task(self._append(list(due)))
            self._write.add_done_callback(self._written)
        else:
            for source in due:
                source.request_append()

    def _written(self, _: asyncio.Task[None]) -> None:
        late, self._write, self._late = self._late, None, False
        if late:
            self._flush()

    async def _append(self, due: list[TokenSource]) -> None:
        # From `idle` to the leases' locks, which `append_staged` takes first, nothing is awaited: a
        # job's own task would write the staged events, and this call would follow its last event.
        unwritten = dict.fromkeys(due)
        sources: list[TokenSource] = []
        try:
            for source in due:
                if not source.idle:
                    source.request_append()
                elif source.stage():
                    sources.append(source)
                    continue
                del unwritten[source]
            written = await self._transport.append_staged([source.lease for source in sources])
            for source, done in zip(sources, written, strict=True):
                if done:
                    del unwritten[source]
        finally:
            for source in unwritten:  # after a fault, those not staged as well
                source.request_append()
