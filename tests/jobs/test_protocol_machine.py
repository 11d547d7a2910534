"""State machine: calls, crashes, cancels, trims, refusals, lost replies and lost writes in any order.

The streams stay valid throughout. A worker that is not picked for a while is in effect paused;
leases last 0 s, so every scan reclaims.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.jobs.echo import begin, end, text, tokens
from tests.jobs.harness import FakeRedisHarness, Harness, LossyStreams, MemoryHarness, lease_settings
from tests.jobs.stream_checker import assert_none, find_violations, keys_without_ttl, violations
from worker.errors import Internal
from worker.jobs import streams as streams_module
from worker.jobs.events import ErrorEvent
from worker.jobs.keys import events_key, queue_key
from worker.jobs.lease import Claim, Fenced, Lease, Renewal
from worker.jobs.streams import Disconnected
from worker.jobs.transport import Transport

LEASE = lease_settings(lease_s=0.0, scan_s=0.001, max_deliveries=1000)
LENGTHS = {"a": 6, "b": 3, "c": 9, "d": 0, "e": 4, "f": 5}
JOBS = st.sampled_from(sorted(LENGTHS))
PICK = st.integers(0, 2)
WRITES = {"read_new", "reclaim", "renew", "give_back", "settle", "take", "append", "expire_job"}
RARELY = st.integers(0, 7).map(lambda n: n == 7)


@dataclass
class Worker:
    transport: Transport
    claims: list[Claim] = field(default_factory=list)
    leases: list[Lease] = field(default_factory=list)
    finished: list[Lease] = field(default_factory=list)


class ProtocolMachine(RuleBasedStateMachine):
    harness_class: type[Harness] = MemoryHarness

    @initialize(jobs=st.lists(JOBS, min_size=3, max_size=8))
    def open(self, jobs: list[str]) -> None:
        self.runner = asyncio.Runner()
        self.losing = self.refusing = 0
        self.names = count()
        self.trimmed: set[str] = set()
        self.deleted: set[str] = set()
        self.submitted: set[str] = set()
        self.do(self._open())
        for job_id in jobs:
            self.submit(job_id)

    async def _open(self) -> None:
        self.harness = self.harness_class()
        self.streams = self.harness.connect()
        self.client = self.harness.client()
        self.workers = [await self._worker() for _ in range(3)]

    async def _worker(self) -> Worker:
        lossy = LossyStreams(self.harness.connect(), self._loses, self._refuse)
        return Worker(await self.harness.transport(f"w{next(self.names)}", LEASE, lossy))

    def _loses(self, _: str) -> bool:
        self.losing = max(0, self.losing - 1)
        return self.losing % 2 == 1

    async def _refuse(self, name: str) -> None:
        if self.refusing and name in WRITES:
            self.refusing -= 1
            raise Disconnected("too few replicas", "NOREPLICAS")

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    @rule(job_id=JOBS)
    def submit(self, job_id: str) -> None:
        self.submitted.add(job_id)
        self.do(self.client.submit(job_id=job_id, prompt="hello"))

    @rule(calls=st.integers(1, 6))
    def lose_replies(self, calls: int) -> None:
        self.losing = calls

    @rule(calls=st.integers(1, 6))
    def refuse_writes(self, calls: int) -> None:
        self.refusing = calls

    @rule(n=PICK)
    def claim(self, n: int) -> None:
        claim = self._claimed(n)
        self.workers[n].claims += [claim] if claim else []

    @precondition(lambda self: any(worker.claims for worker in self.workers))
    @rule(n=PICK)
    def take(self, n: int) -> None:
        worker = self.workers[n]
        if worker.claims:
            self._begin(worker, worker.claims.pop())

    @rule(n=PICK)
    def claim_and_take(self, n: int) -> None:
        claim = self._claimed(n)
        if claim:
            self._begin(self.workers[n], claim)

    def _claimed(self, n: int) -> Claim | None:
        transport = self.workers[n].transport
        transport._consumers["default"]._next_scan_s = 0.0  # every claim scans: results must not depend on time
        return self.do(transport.claim())

    def _begin(self, worker: Worker, claim: Claim) -> None:
        lease = self.do(begin(worker.transport, claim))
        if isinstance(lease, Lease):
            worker.leases.append(lease)
        else:
            worker.transport.forget(claim)

    @precondition(lambda self: any(worker.leases for worker in self.workers))
    @rule(n=PICK, size=st.integers(1, 3))
    def append(self, n: int, size: int) -> None:
        for worker, lease in self._a_lease(n):
            until = min(lease.tokens + size, LENGTHS[lease.job_id])
            self._try_write(worker, lease, worker.transport.append(lease, tokens(lease.tokens, until)))

    @precondition(lambda self: any(worker.leases for worker in self.workers))
    @rule(n=PICK)
    def finish(self, n: int) -> None:
        for worker, lease in self._a_lease(n):
            until = LENGTHS[lease.job_id]
            rest = [tokens(lease.tokens, until)] if lease.tokens < until else []
            if self._try_write(worker, lease, worker.transport.finish(lease, *rest, end(until))):
                worker.leases.remove(lease)
                worker.finished.append(lease)

    @precondition(lambda self: any(worker.finished for worker in self.workers))
    @rule(n=PICK)
    def settle(self, n: int) -> None:
        if self.workers[n].finished:
            lease = self.workers[n].finished.pop()
            with contextlib.suppress(Fenced):
                self.do(self.workers[n].transport.settle(lease))
            self.workers[n].transport.forget(lease.claim)

    @precondition(lambda self: any(worker.leases for worker in self.workers))
    @rule(n=PICK)
    def renew(self, n: int) -> None:
        for worker, lease in self._a_lease(n):
            renewal = self.do(worker.transport.renew(lease))
            if renewal is Renewal.LOST:
                self._drop(worker, lease)
            elif renewal in (Renewal.CANCEL_REQUESTED, Renewal.DELETED):
                cancelled = ErrorEvent(code="CANCELLED", message="cancelled by request")
                if self._try_write(worker, lease, worker.transport.finish(lease, cancelled)):
                    worker.leases.remove(lease)
                    worker.finished.append(lease)

    @precondition(lambda self: any(worker.leases for worker in self.workers))
    @rule(n=PICK)
    def give_back(self, n: int) -> None:
        for worker, lease in self._a_lease(n):
            self.do(worker.transport.release(lease))
            self._drop(worker, lease)

    @precondition(lambda self: any(worker.leases for worker in self.workers))
    @rule(n=PICK)
    def abandon(self, n: int) -> None:
        for worker, lease in self._a_lease(n):
            self.do(worker.transport.abandon(lease, Internal("a fault")))
            self._drop(worker, lease)

    @precondition(lambda self: any(worker.leases for worker in self.workers))
    @rule(n=PICK)
    def delete_entry(self, n: int) -> None:
        """Delete the queue entry of a running job, whose owner must end it."""
        for _, lease in self._a_lease(n):
            self.deleted.add(lease.job_id)
            self.do(self.streams.delete(queue_key("default"), lease.claim.entry_id))

    @rule(n=PICK)
    def crash(self, n: int) -> None:
        self.workers[n] = self.do(self._worker())

    @rule(job_id=JOBS, wanted=RARELY)
    def cancel(self, job_id: str, wanted: bool) -> None:
        if wanted and self.do(self.client.cancel(job_id)) != "unknown":
            self.submitted.add(job_id)

    @rule(job_id=JOBS, wanted=RARELY)
    def trim(self, job_id: str, wanted: bool) -> None:
        if wanted:
            self.trimmed.add(job_id)
            self.do(self.harness.trim(events_key(job_id)))

    def _a_lease(self, n: int) -> list[tuple[Worker, Lease]]:
        """The oldest lease of that worker, else of another; stale leases come first."""
        held = [(worker, lease) for worker in self.workers[n:] + self.workers[:n] for lease in worker.leases]
        return held[:1]

    def _try_write(self, worker: Worker, lease: Lease, work: Coroutine[Any, Any, None]) -> bool:
        try:
            self.do(work)
        except Fenced:
            self.do(worker.transport.release(lease.claim))
            self._drop(worker, lease)
            return False
        return True

    def _drop(self, worker: Worker, lease: Lease) -> None:
        worker.leases.remove(lease)
        worker.transport.forget(lease.claim)

    @invariant()
    def streams_are_valid_so_far(self) -> None:
        for job_id in sorted(self.submitted - self.trimmed):
            records = self.do(self.streams.range(events_key(job_id), "-", "+", 1000))
            assert_none(violation for violation in violations(job_id, records) if "no terminal event" not in violation)
        assert_none(keys_without_ttl(self.do(self.harness.keys())))

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            self.losing = self.refusing = 0
            self.do(self._finish_all())
            texts = {job_id: text(LENGTHS[job_id]) for job_id in self.submitted - self.trimmed - self.deleted}
            self.do(self._check(texts))
            self.do(self.harness.close())
            self.runner.close()

    async def _finish_all(self) -> None:
        reliable = await self._worker()
        while await self.client.queue() or await self.streams.pending("default", 1):
            reliable.transport._consumers["default"]._next_scan_s = 0.0
            claim = await reliable.transport.claim()
            lease = await begin(reliable.transport, claim) if claim else None
            if isinstance(lease, Lease):
                until = LENGTHS[lease.job_id]
                await reliable.transport.finish(lease, tokens(lease.tokens, until), end(until))
                await reliable.transport.settle(lease)
            if claim:
                reliable.transport.forget(claim)

    async def _check(self, texts: dict[str, str]) -> None:
        assert_none(await find_violations(self.streams, "default", texts))


class FakeRedisMachine(ProtocolMachine):
    harness_class = FakeRedisHarness


class LosingServerMachine(ProtocolMachine):
    """The server restarts with the state before one of the last steps, while the workers run on.

    Without the rules that do not concern this, so that a loss follows more of the others.
    """

    lose_replies = refuse_writes = trim = delete_entry = cancel = abandon = claim = take = None  # type: ignore[assignment]

    @initialize()
    def remember_nothing(self) -> None:
        self.states: deque[Callable[[], Awaitable[None]]] = deque(maxlen=6)

    def _lose(self, steps: int) -> None:
        if len(self.states) >= steps:
            self.do(self.states[-steps]())

    # Three rules, to be chosen as often as three others.
    lose_a_write = rule()(lambda self: self._lose(2))
    lose_two_writes = rule()(lambda self: self._lose(3))
    lose_writes = rule(steps=st.integers(4, 6))(_lose)

    def _a_lease(self, n: int) -> list[tuple[Worker, Lease]]:
        """Any lease: of two attempts at one job each writes."""
        held = [(worker, lease) for worker in self.workers for lease in worker.leases]
        return [held[n % len(held)]]

    @invariant()
    def remember(self) -> None:
        self.states.append(self.do(self._save()))

    async def _save(self) -> Callable[[], Awaitable[None]]:
        saved, submitted = set(await self.harness.keys()), set(self.submitted)
        restore = await self.harness.snapshot(*saved)

        async def lose() -> None:
            for key in set(await self.harness.keys()) - saved:
                await self.harness.drop(key)
            await restore()
            self.submitted = set(submitted)

        return lose


class LosingFakeRedisMachine(LosingServerMachine):
    harness_class = FakeRedisHarness


QUICK = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much]}


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams_module, "FIRST_DELAY_S", 0.0)


class TestInMemory(ProtocolMachine.TestCase):
    settings = settings(max_examples=150, stateful_step_count=50, **QUICK)


class TestOnFakeRedis(FakeRedisMachine.TestCase):
    settings = settings(max_examples=30, stateful_step_count=40, **QUICK)


class TestWithLostWrites(LosingServerMachine.TestCase):
    settings = settings(max_examples=150, stateful_step_count=50, **QUICK)


class TestWithLostWritesOnFakeRedis(LosingFakeRedisMachine.TestCase):
    settings = settings(max_examples=20, stateful_step_count=40, **QUICK)
