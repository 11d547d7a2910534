"""A server that forgets acknowledged writes in which a job began: its readers miss nothing and hear nothing twice.

The job is begun again as the same epoch, and its entries are cut elsewhere, so ids that a reader has heard of hold
other tokens now.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.jobs.echo import end, take_next, tokens
from tests.jobs.harness import LONG_LEASE, NO_LEASE, Harness
from worker.jobs.client import Client
from worker.jobs.events import Metrics, Token
from worker.jobs.keys import events_key, state_key
from worker.jobs.reader import StreamEvent
from worker.jobs.transport import Transport

METRICS = Metrics(tokens_out=1, tokens_per_second=1.0, decode_ms=1.0, vram_used=1, vram_free=1)


async def until(events: AsyncIterator[StreamEvent], index: int) -> list[StreamEvent]:
    """What comes up to the token of this index."""
    heard = []
    async for item in events:
        heard.append(item)
        if isinstance(item.event, Token) and item.event.i == index:
            break
    return heard


def shown(items: list[StreamEvent]) -> list[str | int]:
    return [item.event.i if isinstance(item.event, Token) else item.kind for item in items]


async def begun(harness: Harness, client: Client, *batches: tuple[int, int]) -> Transport:
    """A worker has published these batches of a job; the one that takes over when the server has forgotten them."""
    await client.submit(job_id="a", prompt="hello")
    first, second = await harness.transport("w1", LONG_LEASE), await harness.transport("w2", NO_LEASE)
    lease = await take_next(first)
    for batch in batches:
        await first.append(lease, tokens(*batch))
    return second


async def forget(harness: Harness) -> None:
    for key in (events_key("a"), state_key("a")):
        await harness.drop(key)


async def begin_again(worker: Transport, *batches: tuple[int, int] | None) -> None:
    """The job from its beginning to its end, in other batches; None stands for an entry without tokens."""
    lease = await take_next(worker)
    assert lease.epoch == 1
    for batch in batches:
        await worker.append(lease, tokens(*batch) if batch else METRICS)
    await worker.finish(lease, end(lease.tokens))


@pytest.mark.parametrize(
    "batches",
    [
        [(0, 5), (5, 6), (6, 9), (9, 12)],  # the reader goes on after the third entry: tokens 4 to 8 would be missing
        [None, None, (0, 2), (2, 6), (6, 12)],  # it would hear 2 and 3 again
        [None, (0, 2), (2, 12)],  # it would hear the end alone
        [(0, 12)],  # all that it lacks is below where it goes on
    ],
)
async def test_a_reader_that_was_there_hears_every_token_once(
    harness: Harness, batches: list[tuple[int, int] | None]
) -> None:
    client = harness.client()
    successor = await begun(harness, client, (0, 1), (1, 3), (3, 4))
    events = client.events("a", idle_s=0.2)
    heard = await until(events, 3)
    await forget(harness)
    await begin_again(successor, *batches)
    heard += [item async for item in events]
    assert shown(heard) == ["started", *range(12), "end"]


@pytest.mark.parametrize("batches", [[(0, 7), (7, 9), (9, 12)], [(0, 12)], [(0, 1), (1, 2), (2, 12)]])
async def test_a_reader_that_comes_back_with_its_index_hears_the_rest_once(
    harness: Harness, batches: list[tuple[int, int]]
) -> None:
    client = harness.client()
    successor = await begun(harness, client, (0, 1), (1, 4))
    heard = await until(client.events("a", idle_s=0.2), 3)
    await forget(harness)
    await begin_again(successor, *batches)
    rest = [token.i async for token in client.tokens("a", heard[-1].resume, 0.2, next_i=4)]
    assert rest == list(range(4, 12))


async def test_a_reader_at_an_id_that_is_nowhere_hears_all_again_where_it_knows_no_index(harness: Harness) -> None:
    client = harness.client()
    successor = await begun(harness, client, (0, 1), (1, 2), (2, 4))
    heard = await until(client.events("a", idle_s=0.2), 3)
    await forget(harness)
    await begin_again(successor, (0, 12))
    assert shown([item async for item in client.events("a", heard[-1].resume, 0.2)]) == [*range(12), "end"]


async def test_the_index_also_goes_on_within_an_entry(harness: Harness) -> None:
    client = harness.client()
    worker = await begun(harness, client)
    await forget(harness)
    await begin_again(worker, (0, 8), (8, 12))
    heard = await until(client.events("a"), 5)
    assert [token.i async for token in client.tokens("a", heard[-1].resume, next_i=6)] == list(range(6, 12))


async def test_tokens_that_are_nowhere_hold_a_reader_up_only_once(harness: Harness) -> None:
    client = harness.client()
    worker = await begun(harness, client)
    await forget(harness)
    await begin_again(worker, (0, 2), (2, 4), (4, 6), (6, 8), (8, 12))
    streams, key = harness.connect(), events_key("a")
    for lost in ("1-2", "1-4"):
        await streams.delete(key, lost)
    assert shown([item async for item in client.events("a")]) == ["started", 0, 1, 4, 5, *range(8, 12), "end"]
