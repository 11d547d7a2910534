"""Leases of several attempts are renewed together, and each of them alone where that fails."""

from __future__ import annotations

import asyncio
import io

from tests.jobs.harness import LossyStreams
from tests.service.models import slow_model
from tests.service.serving import read_job, serving
from worker.config import LeaseSection, LogSection
from worker.echo import load_echo
from worker.jobs.lease import Renewal
from worker.service.renewal_loop import RenewalLoop
from worker.telemetry import open_log

RENEW_S = 0.08
LOG = open_log(LogSection(format="json"), "w", io.StringIO())


class Leases:
    """A transport that records its calls, and answers with `renewal` after `wait` is set."""

    def __init__(self, renewal=Renewal.HELD, together=Renewal.HELD):
        self.renewal, self.together = renewal, together
        self.wait = asyncio.Event()
        self.wait.set()
        self.alone, self.groups = [], []

    async def renew(self, held):
        self.alone.append(held)
        await self.wait.wait()
        return self.renewal

    async def renew_many(self, held):
        self.groups.append(held)
        await self.wait.wait()
        if isinstance(self.together, Exception):
            raise self.together
        return [self.together] * len(held)


class Attempt:
    """A renewed attempt that records the results."""

    def __init__(self, name):
        self.held, self.keeps, self.results = name, True, []
        self.output = io.StringIO()
        self.log = open_log(LogSection(format="json"), "w", self.output)

    def on_renewal(self, renewal):
        self.results.append(renewal)


async def test_one_attempt_is_renewed_alone_and_periodically():
    leases, attempt = Leases(), Attempt("a")
    loop = RenewalLoop(leases, RENEW_S, LOG)
    loop.add(attempt)
    await asyncio.sleep(RENEW_S / 2)
    assert leases.alone == []
    await asyncio.sleep(3 * RENEW_S)
    await loop.remove(attempt)
    assert 2 <= len(leases.alone) <= 3
    assert attempt.results == [Renewal.HELD] * len(leases.alone)
    await asyncio.sleep(2 * RENEW_S)
    assert len(attempt.results) == len(leases.alone) <= 3
    assert leases.groups == []


async def test_attempts_that_began_at_about_the_same_time_are_renewed_together():
    leases, attempts = Leases(), [Attempt(n) for n in range(4)]
    loop = RenewalLoop(leases, RENEW_S, LOG)
    for attempt in attempts:
        loop.add(attempt)
        await asyncio.sleep(RENEW_S / 20)
    await asyncio.sleep(1.5 * RENEW_S)
    for attempt in attempts:
        await loop.remove(attempt)
    assert leases.groups[0] == [0, 1, 2, 3]
    assert leases.alone == []
    assert all(attempt.results for attempt in attempts)


async def test_a_removal_waits_for_the_call_in_flight_and_for_that_of_its_repetition():
    leases, attempts = Leases(together=None), [Attempt("a"), Attempt("b")]
    leases.wait.clear()
    loop = RenewalLoop(leases, RENEW_S, LOG)
    for attempt in attempts:
        loop.add(attempt)
    await asyncio.sleep(1.5 * RENEW_S)
    assert leases.groups == [["a", "b"]]
    removal = asyncio.create_task(loop.remove(attempts[0]))
    await asyncio.sleep(0.01)
    assert not removal.done()
    leases.wait.set()
    await asyncio.wait_for(removal, 1)
    assert attempts[0].results == [Renewal.HELD]
    await asyncio.sleep(3 * RENEW_S)
    await loop.remove(attempts[1])
    assert attempts[0].results == [Renewal.HELD]
    assert len(attempts[1].results) >= 2


async def test_a_fault_of_the_call_leads_to_single_renewals():
    leases, attempts = Leases(Renewal.CANCEL_REQUESTED, ZeroDivisionError()), [Attempt("a"), Attempt("b")]
    output = io.StringIO()
    loop = RenewalLoop(leases, RENEW_S, open_log(LogSection(format="json"), "w", output))
    for attempt in attempts:
        loop.add(attempt)
    await asyncio.sleep(1.5 * RENEW_S)
    for attempt in attempts:
        await loop.remove(attempt)
    assert [attempt.results for attempt in attempts] == [[Renewal.CANCEL_REQUESTED]] * 2
    assert output.getvalue().count("ZeroDivisionError") == len(leases.groups)
    assert [attempt.output.getvalue() for attempt in attempts] == ["", ""]


async def test_an_entry_that_is_lost_is_not_renewed():
    leases, attempts = Leases(), [Attempt("a"), Attempt("b"), Attempt("c")]
    attempts[1].keeps = False
    loop = RenewalLoop(leases, RENEW_S, LOG)
    for attempt in attempts:
        loop.add(attempt)
    await asyncio.sleep(1.5 * RENEW_S)
    for attempt in attempts:
        await loop.remove(attempt)
    assert leases.groups[0] == ["a", "c"]
    assert attempts[1].results == []


async def test_jobs_keep_their_short_leases_with_lost_replies_of_renewals(harness):
    """Each lease is as long as six renewals; other workers would take over jobs that are not renewed."""
    lost = []

    def lose(name):
        lost.append(name == "renew_many" and len(lost) % 2 == 0)
        return lost[-1]

    lease, client = LeaseSection(lease_s=0.6, renew_s=0.1, scan_s=0.05), harness.client()
    model = load_echo(512, 512, 0.05, lambda done, total: None, max_running=4)
    streams = LossyStreams(harness.connect(), lose)
    async with serving(harness, model, streams=streams, lease=lease) as one:
        for n in range(4):
            await client.submit(job_id=f"j{n}", prompt=f"job {n}", max_tokens=40)
        reading = asyncio.gather(*(read_job(client, f"j{n}") for n in range(4)))
        await asyncio.sleep(0.3)
        async with serving(harness, slow_model(0.01), name="w2", lease=lease):
            results = await reading
        assert [result.text for result in results] == [(f"job {n}" * 40)[:40] for n in range(4)]
        assert one.logged("job_released") == []
        assert any(lost)
