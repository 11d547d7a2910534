"""Renews the leases of all attempts of a worker, those that are due together in one round trip.

A lease is renewed `renew_s` after its last renewal or up to a quarter of that earlier, so that the
leases of many jobs form few groups. With one due lease, and for each of a group whose renewal was
not answered, the call is `Transport.renew`, which waits for the server.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Protocol

from worker.errors import ServerRefused
from worker.jobs.lease import Claim, Lease, Renewal
from worker.jobs.transport import Transport
from worker.telemetry import Log, Refusals, frames_of

_EARLY = 0.25
"""Part of `renew_s` by which a renewal may be early."""


class Renewed(Protocol):
    """A running attempt; implemented by `Attempt`."""

    @property
    def held(self) -> Claim | Lease:
        """What is renewed."""

    @property
    def keeps(self) -> bool:
        """Whether to renew: false once the entry is lost, or left to expire."""

    @property
    def log(self) -> Log:
        """The log with the attempt's fields."""

    def on_renewal(self, renewal: Renewal) -> None:
        """Receive the result of a renewal."""


class RenewalLoop:
    """Renewals of a worker's leases. Used on the event loop."""

    def __init__(self, transport: Transport, renew_s: float, log: Log, refusals: Refusals | None = None) -> None:
        self._transport = transport
        self._renew_s = renew_s
        self._log = log
        self._refusals = refusals or Refusals(log)
        self._due: dict[Renewed, float] = {}
        """When each attempt is renewed next, by the event loop's clock; without those in flight."""
        self._calls: dict[Renewed, asyncio.Task[None]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, attempt: Renewed) -> None:
        """Renew `attempt` from now on."""
        self._due[attempt] = asyncio.get_running_loop().time() + self._renew_s
        self._schedule()

    async def remove(self, attempt: Renewed) -> None:
        """Stop renewing. Waits for a call in flight; to cancel it would lose its connection."""
        self._due.pop(attempt, None)
        while call := self._calls.get(attempt):
            await asyncio.wait([call])
            self._due.pop(attempt, None)

    def _schedule(self) -> None:
        if not self._due:
            return
        at = min(self._due.values())
        if self._timer is not None:
            if self._timer.when() <= at:
                return
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(at, self._renew_due)

    def _renew_due(self) -> None:
        self._timer = None
        limit = asyncio.get_running_loop().time() + _EARLY * self._renew_s
        due = [attempt for attempt, at in self._due.items() if at <= limit]
        for attempt in due:
            del self._due[attempt]
        due = [attempt for attempt in due if attempt.keeps]
        if len(due) == 1:
            self._start(self._renew_alone, due)
        elif due:
            self._start(self._renew_together, due)
        self._schedule()

    def _start(self, call: Callable[[Sequence[Renewed]], Awaitable[None]], attempts: Sequence[Renewed]) -> None:
        task = asyncio.ensure_future(call(attempts))
        self._calls |= dict.fromkeys(attempts, task)
        task.add_done_callback(partial(self._renewed, attempts))

    def _renewed(self, attempts: Sequence[Renewed], task: asyncio.Task[None]) -> None:
        for attempt in attempts:
            if self._calls.get(attempt) is task:  # else it is renewed alone
                del self._calls[attempt]
                self._due[attempt] = asyncio.get_running_loop().time() + self._renew_s
        self._schedule()

    async def _renew_alone(self, attempts: Sequence[Renewed]) -> None:
        (attempt,) = attempts
        try:
            attempt.on_renewal(await self._transport.renew(attempt.held))
            self._refusals.succeeded("renew")
        except ServerRefused as error:
            self._refusals.failed("renew", error)
        except Exception as error:  # without renewals another worker takes over, and this one is fenced
            attempt.log.error("renewal_fault", frames=frames_of(error))

    async def _renew_together(self, attempts: Sequence[Renewed]) -> None:
        renewals: Sequence[Renewal | None] = [None] * len(attempts)
        try:
            renewals = await self._transport.renew_many([attempt.held for attempt in attempts])
        except Exception as error:
            self._log.error("renewal_fault", frames=frames_of(error))
        for attempt, renewal in zip(attempts, renewals, strict=True):
            if renewal is None:
                self._start(self._renew_alone, [attempt])
            else:
                attempt.on_renewal(renewal)
