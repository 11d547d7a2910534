"""Jobs that kill who runs them: attempts without progress, too many deliveries, and the dead-letter stream."""

from __future__ import annotations

import asyncio
from itertools import count

import pytest

from tests.jobs.echo import begin, claimed, complete, taken, text, tokens
from tests.jobs.worlds import GREEDY, Lossy, World, all_is_well
from worker.jobs.events import ErrorEvent
from worker.jobs.lease import Closed, Policy


async def test_a_third_attempt_without_progress_is_dead_lettered(world: World) -> None:
    client = world.client()
    await client.submit(job_id="a", prompt="poison")
    first = await world.transport("w0", GREEDY)
    await first.append(await taken(first), tokens(0, 1))
    for n in range(1, 4):
        await taken(await world.transport(f"w{n}", GREEDY))
    last = await world.transport("w4", GREEDY)
    closed = await begin(last, await claimed(last))
    assert isinstance(closed, Closed)
    assert closed.reason == "dead_lettered"
    assert closed.error is not None
    assert closed.error.code == "DEAD_LETTERED"
    (letter,) = await client.dead_letters()
    assert (letter.job_id, letter.attempts) == ("a", 4)
    assert await client.queue() == []
    await all_is_well(world, a=None)


async def test_attempts_that_made_progress_or_were_given_back_are_not_poison(world: World) -> None:
    client = world.client()
    await client.submit(job_id="a", prompt="long")
    for n in range(6):
        worker = await world.transport(f"w{n}", GREEDY)
        lease = await taken(worker)
        if n % 2:
            await worker.release(lease)
        else:
            await worker.append(lease, tokens(lease.tokens, lease.tokens + 1))
    worker = await world.transport("w6", GREEDY)
    await complete(worker, await taken(worker), 5)
    await all_is_well(world, a=text(5))


async def test_an_entry_that_was_delivered_too_often_is_not_looked_into_again(world: World) -> None:
    client, policy = world.client(), Policy(lease_s=0.0, scan_s=0.02, max_deliveries=2)
    await client.submit(job_id="a", prompt="it kills whoever reads it")
    await world.connect().enqueue("default", {"p": b"\xc1"}, 10)
    handed_out = [await (await world.transport(f"w{n}", policy)).claim() for n in range(6)]
    assert [claim and claim.deliveries for claim in handed_out] == [1, 2, None, 1, 2, None]
    assert [letter.job_id for letter in await client.dead_letters()] == ["a", ""]
    (only,) = [item async for item in client.events("a")]
    assert isinstance(only.event, ErrorEvent)
    assert only.event.code == "DEAD_LETTERED"
    await all_is_well(world, a=None)


async def test_death_between_the_dead_letter_s_event_and_its_record_loses_no_dead_letter(world: World) -> None:
    client = world.client()
    await client.submit(job_id="a", prompt="poison")
    for n in range(3):
        await taken(await world.transport(f"w{n}", GREEDY))

    def dies(name: str) -> bool:
        if name == "take" and next(turns) == 1:
            raise asyncio.CancelledError
        return False

    turns = count()
    dying = await world.transport("w3", GREEDY, Lossy(world.connect(), dies))
    claim = await claimed(dying)
    with pytest.raises(asyncio.CancelledError):
        await begin(dying, claim)
    heir = await world.transport("w4", GREEDY)
    assert await begin(heir, await claimed(heir)) == Closed("over")
    assert [letter.job_id for letter in await client.dead_letters()] == ["a"]
    await all_is_well(world, a=None)
