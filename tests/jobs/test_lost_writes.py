"""A server loses acknowledged writes, including a job's start: readers get each token once.

The job starts again in the same epoch and batches its tokens differently, so entry ids that a
reader has seen now hold other tokens.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.jobs.echo import begin, claim_next, end, take_next, tokens
from tests.jobs.harness import LONG_LEASE, NO_LEASE, Harness, LossyStreams
from tests.jobs.stream_checker import violations
from worker.errors import EventsLost
from worker.jobs.client import Client
from worker.jobs.events import Metrics, Token
from worker.jobs.keys import events_key, state_key
from worker.jobs.lease import Fenced, Lease
from worker.jobs.reader import StreamEvent
from worker.jobs.transport import Transport

METRICS = Metrics(tokens_out=1, tokens_per_second=1.0, decode_ms=1.0, vram_used=1, vram_free=1)


async def read_until(events: AsyncIterator[StreamEvent], index: int) -> list[StreamEvent]:
    """Read up to the token with this index."""
    received = []
    async for item in events:
        received.append(item)
        if isinstance(item.event, Token) and item.event.i == index:
            break
    return received


def summary(items: list[StreamEvent]) -> list[str | int]:
    return [item.event.i if isinstance(item.event, Token) else item.kind for item in items]


async def publish_batches(harness: Harness, client: Client, *batches: tuple[int, int]) -> Transport:
    """Publish these batches of a job; return a second worker, which can take the job over."""
    await client.submit(job_id="a", prompt="hello")
    first, second = await harness.transport("w1", LONG_LEASE), await harness.transport("w2", NO_LEASE)
    lease = await take_next(first)
    for batch in batches:
        await first.append(lease, tokens(*batch))
    return second


async def lose_writes(harness: Harness) -> None:
    for key in (events_key("a"), state_key("a")):
        await harness.drop(key)


async def restarted(worker: Transport, last: tuple[int, int], *, ends: bool) -> None:
    """After lost writes, run the job anew: the last id is the one before the loss, its event another."""
    lease = await take_next(worker)
    assert lease.epoch == 1
    rest = [tokens(*last), end(last[1])] if ends else [tokens(*last)]
    await (worker.finish if ends else worker.append)(lease, *rest)


@pytest.mark.parametrize("ends", [True, False])
async def test_an_attempt_whose_start_was_lost_is_fenced_by_others_under_the_same_ids(
    harness: Harness, ends: bool
) -> None:
    """Found by tests/protocol_model: the start was written again after another attempt's end."""
    successor = await publish_batches(harness, harness.client(), (0, 1), *([(1, 2)] if ends else []))
    lease = await take_next(successor)
    assert lease.epoch == 2
    await lose_writes(harness)
    await restarted(await harness.transport("w3", NO_LEASE), (0, 2), ends=ends)
    with pytest.raises(Fenced):
        await successor.append(lease, tokens(lease.tokens, 3))
    records = await harness.connect().range(events_key("a"), "-", "+", 100)
    assert [entry_id for entry_id, _ in records] == ["1-0", "1-1", "1-2"][: 3 if ends else 2]


async def test_a_claimer_that_has_read_lost_events_reads_again_before_it_continues(harness: Harness) -> None:
    """Found by tests/protocol_model: it continued at an index of the lost events."""
    await publish_batches(harness, harness.client(), (0, 1))
    other = await harness.transport("w3", NO_LEASE)
    takes = 0

    async def lose_before_the_second_take(name: str) -> None:
        nonlocal takes
        takes += name == "take"
        if name == "take" and takes == 2:
            await lose_writes(harness)
            await restarted(other, (0, 2), ends=False)

    streams = LossyStreams(harness.connect(), lambda _: False, lose_before_the_second_take)
    claimer = await harness.transport("w4", NO_LEASE, streams)
    result = await begin(claimer, await claim_next(claimer))
    assert takes > 1
    if isinstance(result, Lease):
        assert [token.i for token in result.history.tokens] == [0, 1]
    records = await harness.connect().range(events_key("a"), "-", "+", 100)
    assert not [each for each in violations("a", records) if "no terminal event" not in each]


async def run_again(worker: Transport, *batches: tuple[int, int] | None) -> None:
    """Run the job from start to end in other batches; None is an entry without tokens."""
    lease = await take_next(worker)
    assert lease.epoch == 1
    for batch in batches:
        await worker.append(lease, tokens(*batch) if batch else METRICS)
    await worker.finish(lease, end(lease.tokens))


@pytest.mark.parametrize(
    "batches",
    [
        [(0, 5), (5, 6), (6, 9), (9, 12)],  # by entry ids, tokens 4 to 8 would be missing
        [None, None, (0, 2), (2, 6), (6, 12)],  # by entry ids, 2 and 3 would be repeated
        [None, (0, 2), (2, 12)],  # by entry ids, only the end would follow
        [(0, 12)],  # all missing tokens are at or below its entry id
    ],
)
async def test_a_connected_reader_gets_every_token_once(
    harness: Harness, batches: list[tuple[int, int] | None]
) -> None:
    client = harness.client()
    successor = await publish_batches(harness, client, (0, 1), (1, 3), (3, 4))
    events = client.events("a", idle_s=0.2)
    received = await read_until(events, 3)
    await lose_writes(harness)
    await run_again(successor, *batches)
    received += [item async for item in events]
    assert summary(received) == ["started", *range(12), "end"]


@pytest.mark.parametrize("batches", [[(0, 7), (7, 9), (9, 12)], [(0, 12)], [(0, 1), (1, 2), (2, 12)]])
async def test_a_reader_that_resumes_with_its_index_gets_the_rest_once(
    harness: Harness, batches: list[tuple[int, int]]
) -> None:
    client = harness.client()
    successor = await publish_batches(harness, client, (0, 1), (1, 4))
    received = await read_until(client.events("a", idle_s=0.2), 3)
    await lose_writes(harness)
    await run_again(successor, *batches)
    rest = [token.i async for token in client.tokens("a", received[-1].resume, 0.2, next_i=4)]
    assert rest == list(range(4, 12))


async def test_a_reader_that_resumes_at_a_lost_id_without_an_index_gets_all_tokens_again(harness: Harness) -> None:
    client = harness.client()
    successor = await publish_batches(harness, client, (0, 1), (1, 2), (2, 4))
    received = await read_until(client.events("a", idle_s=0.2), 3)
    await lose_writes(harness)
    await run_again(successor, (0, 12))
    assert summary([item async for item in client.events("a", received[-1].resume, 0.2)]) == [*range(12), "end"]


async def test_a_reader_resumes_within_an_entry_by_index(harness: Harness) -> None:
    client = harness.client()
    worker = await publish_batches(harness, client)
    await lose_writes(harness)
    await run_again(worker, (0, 8), (8, 12))
    received = await read_until(client.events("a"), 5)
    assert [token.i async for token in client.tokens("a", received[-1].resume, next_i=6)] == list(range(6, 12))


async def test_missing_tokens_are_an_error_after_one_rewind(harness: Harness) -> None:
    client = harness.client()
    worker = await publish_batches(harness, client)
    await lose_writes(harness)
    await run_again(worker, (0, 2), (2, 4), (4, 6), (6, 12))
    await harness.connect().delete(events_key("a"), "1-2")
    received: list[StreamEvent] = []
    with pytest.raises(EventsLost, match="from 2 to 3"):  # noqa: PT012
        async for item in client.events("a"):
            received.append(item)  # noqa: PERF401  # what came before the error counts
    assert summary(received) == ["started", 0, 1]
