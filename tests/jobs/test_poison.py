"""Poison jobs: attempts without progress, too many deliveries, the dead-letter stream."""

from __future__ import annotations

import asyncio
from itertools import count

import pytest

from tests.jobs.echo import begin, claim_next, complete, take_next, text, tokens
from tests.jobs.harness import NO_LEASE, Harness, LossyStreams, assert_consistent, lease_settings
from worker.jobs.events import ErrorEvent
from worker.jobs.lease import Closed


async def test_a_third_attempt_without_progress_is_dead_lettered(harness: Harness) -> None:
    client = harness.client()
    await client.submit(job_id="a", prompt="poison")
    first = await harness.transport("w0", NO_LEASE)
    await first.append(await take_next(first), tokens(0, 1))
    for n in range(1, 4):
        await take_next(await harness.transport(f"w{n}", NO_LEASE))
    last = await harness.transport("w4", NO_LEASE)
    closed = await begin(last, await claim_next(last))
    assert isinstance(closed, Closed)
    assert closed.reason == "dead_lettered"
    assert closed.error is not None
    assert closed.error.code == "DEAD_LETTERED"
    (letter,) = await client.dead_letters()
    assert (letter.job_id, letter.attempts) == ("a", 4)
    assert await client.queue() == []
    await assert_consistent(harness, a=None)


async def test_attempts_with_progress_or_a_release_do_not_count(harness: Harness) -> None:
    client = harness.client()
    await client.submit(job_id="a", prompt="long")
    for n in range(6):
        worker = await harness.transport(f"w{n}", NO_LEASE)
        lease = await take_next(worker)
        if n % 2:
            await worker.release(lease)
        else:
            await worker.append(lease, tokens(lease.tokens, lease.tokens + 1))
    worker = await harness.transport("w6", NO_LEASE)
    await complete(worker, await take_next(worker), 5)
    await assert_consistent(harness, a=text(5))


async def test_an_entry_delivered_too_often_is_dead_lettered_unparsed(harness: Harness) -> None:
    client, lease = harness.client(), lease_settings(lease_s=0.0, scan_s=0.02, max_deliveries=2)
    await client.submit(job_id="a", prompt="kills its reader")
    await harness.connect().enqueue("default", {"p": b"\xc1"}, 10)
    handed_out = [await (await harness.transport(f"w{n}", lease)).claim() for n in range(6)]
    assert [claim and claim.deliveries for claim in handed_out] == [1, 2, None, 1, 2, None]
    assert [letter.job_id for letter in await client.dead_letters()] == ["a", ""]
    (only,) = [item async for item in client.events("a")]
    assert isinstance(only.event, ErrorEvent)
    assert only.event.code == "DEAD_LETTERED"
    await assert_consistent(harness, a=None)


async def test_a_crash_between_the_error_event_and_the_dead_letter_loses_neither(harness: Harness) -> None:
    client = harness.client()
    await client.submit(job_id="a", prompt="poison")
    for n in range(3):
        await take_next(await harness.transport(f"w{n}", NO_LEASE))

    def dies(name: str) -> bool:
        if name == "take" and next(turns) == 1:
            raise asyncio.CancelledError
        return False

    turns = count()
    dying = await harness.transport("w3", NO_LEASE, LossyStreams(harness.connect(), dies))
    claim = await claim_next(dying)
    with pytest.raises(asyncio.CancelledError):
        await begin(dying, claim)
    successor = await harness.transport("w4", NO_LEASE)
    assert await begin(successor, await claim_next(successor)) == Closed("over")
    assert [letter.job_id for letter in await client.dead_letters()] == ["a"]
    await assert_consistent(harness, a=None)


async def test_a_second_entry_of_a_dead_lettered_job_adds_no_second_letter(harness: Harness) -> None:
    client = harness.client()
    for _ in range(2):
        await client.submit(job_id="a", prompt="poison")
    for n in range(3):
        await take_next(await harness.transport(f"w{n}", NO_LEASE))
    reasons = []
    while await client.queue():
        last = await harness.transport("last", NO_LEASE)
        closed = await begin(last, await claim_next(last))
        assert isinstance(closed, Closed)
        reasons.append(closed.reason)
    assert sorted(reasons) == ["dead_lettered", "over"]
    assert [letter.job_id for letter in await client.dead_letters()] == ["a"]
    await assert_consistent(harness, a=None)
