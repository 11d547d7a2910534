"""The order in which a worker and an orchestrator make the protocol's calls.

The calls themselves, their arguments, retries and verdicts are those of `Transport` and `Client`.
`Worker` makes them in the order of `worker/service/attempt.py`, with every choice that an engine or
an operator could make there.
"""

from __future__ import annotations

import contextlib

from tests.jobs.echo import begin, end, tokens
from tests.protocol_model.automaton import LEASE, Connection, run
from worker.errors import Internal
from worker.jobs.client import Client
from worker.jobs.consumer import RenewalWatch
from worker.jobs.events import ErrorEvent
from worker.jobs.lease import Claim, Fenced, Lease, Renewal
from worker.jobs.streams import Disconnected
from worker.jobs.transport import Transport

JOB = "a"
QUEUE = "default"


class Worker:
    """A worker with one job at a time whose answer has `length` tokens."""

    def __init__(self, name: str, length: int) -> None:
        self.transport = Transport(Connection(0), name, (QUEUE,), LEASE)
        self.length = length
        self.claimed: Claim | None = None
        self.lease: Lease | None = None
        self.ended = False

    def choices(self) -> list[str]:
        """The first one is what an undisturbed worker does next."""
        if self.claimed is None:
            return ["claim"]
        if self.lease is None:
            return ["take", "renew", "drain"]
        if self.ended:
            return ["settle"]
        left = self.length - self.lease.tokens
        progress = [*["append"] * (left > 0), *["append_rest"] * (left > 1), "finish"]
        return [*progress, "renew", "drain", "abandon"]

    def tidy(self) -> None:
        """With a lease of 0 s every entry is overdue, whenever it was seen, and none is avoided."""
        run(self.transport.server_time_ms())  # known, as if it had been read
        consumer = self.transport._consumers[QUEUE]
        consumer._watch = RenewalWatch()
        consumer._avoided_until_s = {}

    async def claim(self) -> None:
        self.claimed = await self.transport.claim()

    async def take(self) -> None:
        result = await begin(self.transport, self._claim)
        if isinstance(result, Lease):
            self.lease = result
        else:
            self._forget()

    async def append(self) -> None:
        await self._append(self._lease.tokens + 1)

    async def append_rest(self) -> None:
        """Publish all missing tokens in one event."""
        await self._append(self.length)

    async def _append(self, until: int) -> None:
        try:
            await self.transport.append(self._lease, tokens(self._lease.tokens, until))
        except Fenced:
            await self._leave()

    async def finish(self) -> None:
        """Publish all missing tokens and the end in one batch."""
        first = self._lease.tokens
        rest = [tokens(first, self.length)] if first < self.length else []
        try:
            await self.transport.finish(self._lease, *rest, end(self.length))
            self.ended = True
        except Fenced:
            await self._leave()

    async def renew(self) -> None:
        renewal = await self.transport.renew(self.lease or self._claim)
        if renewal is Renewal.LOST:
            await self._leave()
        elif renewal is not Renewal.HELD and self.lease is not None:
            try:
                await self.transport.finish(self.lease, ErrorEvent(code="CANCELLED", message="cancelled by request"))
                self.ended = True
            except Fenced:
                await self._leave()

    async def settle(self) -> None:
        with contextlib.suppress(Fenced):
            await self.transport.settle(self._lease)
        self._forget()

    async def drain(self) -> None:
        """Give the job back; it counts neither as a delivery nor as an attempt."""
        await self.transport.release(self.lease or self._claim)
        self._forget()

    async def abandon(self) -> None:
        """Give the job back after a fault of this worker."""
        await self.transport.abandon(self._lease, Internal("a fault"))
        self._forget()

    async def _leave(self) -> None:
        await self.transport.release(self._claim)
        self._forget()

    def _forget(self) -> None:
        self.transport.forget(self._claim)
        self.claimed = self.lease = None
        self.ended = False

    @property
    def _claim(self) -> Claim:
        assert self.claimed is not None
        return self.claimed

    @property
    def _lease(self) -> Lease:
        assert self.lease is not None
        return self.lease


class Orchestrator:
    """Submits the job, perhaps again under the same id, and may cancel it."""

    def __init__(self) -> None:
        self.connection = Connection(0)

    def choices(self) -> list[str]:
        return ["submit", "cancel"]

    def tidy(self) -> None:
        """It keeps nothing."""

    async def submit(self) -> None:
        with contextlib.suppress(Disconnected):
            await Client(self.connection).submit(job_id=JOB, prompt="hello")

    async def cancel(self) -> None:
        with contextlib.suppress(Disconnected):
            await Client(self.connection).cancel(JOB)
