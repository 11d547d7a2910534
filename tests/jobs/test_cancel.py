"""Cancelling: waiting, unknown, running, finished, handed back; by command, by flag, and after a death."""

from __future__ import annotations

import asyncio

import pytest

from tests.jobs.echo import begin, claimed, complete, taken, text, tokens
from tests.jobs.stream_checker import holds, keys_without_expiry
from tests.jobs.worlds import GREEDY, World, all_is_well
from worker.errors import InvalidRequest
from worker.jobs.events import ErrorEvent
from worker.jobs.lease import Closed, Renewal


async def test_a_waiting_job_is_cancelled_at_once_and_its_entry_settled_when_claimed(world: World) -> None:
    client, worker = world.client(), await world.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    assert await client.cancel("a") == "cancelled"
    assert await client.cancel("a") == "cancelled"
    (only,) = [item async for item in client.events("a")]
    assert isinstance(only.event, ErrorEvent)
    assert (only.event.code, only.envelope.epoch, only.envelope.job_id) == ("CANCELLED", 1, "a")
    assert await begin(worker, await claimed(worker)) == Closed("over")
    assert await client.queue() == []
    await all_is_well(world, a=None)


async def test_an_unknown_job_can_be_cancelled_before_it_comes(world: World) -> None:
    client, worker = world.client(), await world.transport("w1")
    assert await client.cancel("a") == "cancelled"
    holds(keys_without_expiry(await world.keys()))
    await client.submit(job_id="a", prompt="hello")
    assert await begin(worker, await claimed(worker)) == Closed("over")
    await all_is_well(world, a=None)


async def test_a_running_job_is_asked_to_stop_by_command_and_by_flag(world: World) -> None:
    client, worker = world.client(), await world.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lease = await taken(worker)
    assert await worker.renew(lease) is Renewal.HELD
    hearing = asyncio.ensure_future(anext(worker.presence.commands()))
    assert await client.cancel("a") == "requested"
    assert await client.cancel("a") == "requested"
    command = await hearing
    assert (command.do, command.target) == ("cancel", "a")
    assert await worker.renew(lease) is Renewal.CANCEL_REQUESTED
    await worker.finish(lease, ErrorEvent(code="CANCELLED", message="cancelled by request"))
    await worker.settle(lease)
    assert await client.cancel("a") == "cancelled"
    await all_is_well(world, a=None)


async def test_a_finished_job_cannot_be_cancelled(world: World) -> None:
    client, worker = world.client(), await world.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    await complete(worker, await taken(worker), 1)
    assert await client.cancel("a") == "over"
    await all_is_well(world, a=text(1))
    with pytest.raises(InvalidRequest):
        await client.cancel("not an id")


async def test_a_cancel_of_a_dead_worker_s_job_is_honoured_by_the_next(world: World) -> None:
    client, dead = world.client(), await world.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    await dead.append(await taken(dead), tokens(0, 2))
    assert await client.cancel("a") == "requested"
    heir = await world.transport("w2", GREEDY)
    closed = await begin(heir, await claimed(heir))
    assert isinstance(closed, Closed)
    assert closed.reason == "cancelled"
    assert await client.queue() == []
    await all_is_well(world, a=None)


async def test_a_job_that_was_handed_back_is_waiting_and_cancelled_at_once(world: World) -> None:
    client, worker = world.client(), await world.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lease = await taken(worker)
    await worker.append(lease, tokens(0, 2))
    await worker.release(lease)
    assert await client.cancel("a") == "cancelled"
    heir = await world.transport("w2")
    assert await begin(heir, await claimed(heir)) == Closed("over")
    await all_is_well(world, a=None)
