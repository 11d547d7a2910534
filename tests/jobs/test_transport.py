"""The protocol for one job and its reader, over each implementation of `Streams`."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.jobs.echo import begin, claim_next, complete, end, take_next, text, token, tokens
from tests.jobs.harness import LONG_LEASE, NO_LEASE, Harness, LossyStreams, assert_consistent, wait_until
from worker.errors import InvalidRequest
from worker.jobs.events import ErrorEvent, Tokens
from worker.jobs.keys import events_key, state_key
from worker.jobs.lease import Closed, Fenced
from worker.jobs.protocol import Trace

DAY_MS = 24 * 3600 * 1000


async def test_a_job_goes_in_and_tokens_come_out(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    job_id = await client.submit(job_id="a", prompt="hello")
    lease = await take_next(worker)
    assert (lease.job_id, lease.epoch) == (job_id, 1)
    await complete(worker, lease, 5)
    received = [item async for item in client.events("a")]
    assert [item.kind for item in received] == ["started", *["token"] * 5, "end"]
    assert [item.entry_id for item in received] == [f"1-{seq}" for seq in range(7)]
    assert await client.result("a") == (text(5), end(5))
    await assert_consistent(harness, a=text(5))


async def test_a_finished_job_leaves_the_queue_and_its_keys_live_for_a_day(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lease = await take_next(worker)
    for key in (events_key("a"), state_key("a")):
        assert 6 * DAY_MS < ((await harness.keys())[key] or 0) <= 7 * DAY_MS
    await complete(worker, lease, 1)
    assert await client.queue() == []
    for key in (events_key("a"), state_key("a")):
        assert 0.9 * DAY_MS < ((await harness.keys())[key] or 0) <= DAY_MS


async def test_every_event_carries_its_job_epoch_worker_and_trace(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello", correlation_id="mine", traceparent="00-aa-bb-01")
    await complete(worker, await take_next(worker), 1)
    async for item in client.events("a"):
        envelope = item.envelope
        assert (envelope.v, envelope.job_id, envelope.epoch, envelope.worker_id) == (1, "a", 1, "w1")
        assert (envelope.correlation_id, envelope.traceparent) == ("mine", "00-aa-bb-01")
        assert envelope.ts_ms > 1.6e12


async def test_a_reader_resumes_at_any_id_without_gap_or_repetition(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lease = await take_next(worker)
    await worker.append(lease, tokens(0, 3))
    await worker.append(lease, tokens(3, 4))
    await worker.finish(lease, tokens(4, 6), end(6))
    whole = [item async for item in client.events("a")]
    for at, item in enumerate(whole[:-1]):
        rest = [later async for later in client.events("a", after=item.resume)]
        assert rest[-1] == whole[-1]
        repeated = len(rest) - (len(whole) - at - 1)
        assert rest[repeated:] == whole[at + 1 :]
        assert all(again.entry_id == item.entry_id for again in rest[:repeated])
    assert [later async for later in client.events("a", after=whole[-1].resume)] == []


async def test_a_waiting_reader_gets_the_answer_as_it_is_written(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    reading = asyncio.create_task(client.result("a"))
    await client.submit(job_id="a", prompt="hello")
    await complete(worker, await take_next(worker), 3)
    assert (await reading)[0] == text(3)


async def test_two_queue_entries_of_one_job_id_run_once(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    for _ in range(3):
        await client.submit(job_id="a", prompt="hello")
    lease = await take_next(worker)
    assert await begin(worker, await claim_next(worker)) == Closed("duplicate")
    await complete(worker, lease, 2)
    assert await begin(worker, await claim_next(worker)) == Closed("over")
    assert await client.queue() == []
    await assert_consistent(harness, a=text(2))


async def test_many_workers_run_every_job_once(harness: Harness) -> None:
    client = harness.client()
    workers = [await harness.transport(f"w{n}", LONG_LEASE) for n in range(4)]
    jobs = {f"j{n}": text(n % 3) for n in range(24)}
    for job_id in jobs:
        await client.submit(job_id=job_id, prompt="hello")

    async def serve(worker: object) -> int:
        served = 0
        while (claim := await worker.claim()) is not None:
            lease = await begin(worker, claim)
            await complete(worker, lease, int(lease.job_id[1:]) % 3)
            served += 1
        return served

    assert sum(await asyncio.gather(*map(serve, workers))) == 24
    await assert_consistent(harness, **jobs)


async def test_an_answer_can_be_long(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lease = await take_next(worker)
    for first in range(0, 2500, 2):
        await worker.append(lease, tokens(first, first + 2))
    successor = await harness.transport("w2", NO_LEASE)
    lease = await take_next(successor)
    assert len(lease.history.tokens) == 2500
    await complete(successor, lease, 2501)
    await assert_consistent(harness, a=text(2501))


async def test_a_token_index_out_of_order_is_refused_before_it_is_written(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lease = await take_next(worker)
    with pytest.raises(ValueError, match="token 1 where 0 is the next"):
        await worker.append(lease, tokens(1, 2))
    with pytest.raises(ValueError, match="tokens is not a terminal event"):
        await worker.finish(lease, Tokens(tokens=(token(0),)))
    await complete(worker, lease, 1)
    await assert_consistent(harness, a=text(1))


async def test_a_json_payload_added_directly_is_a_job(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    fields = {"p": b'{"job_id": "by-hand", "prompt": "hello", "max_tokens": 2}', "traceparent": b"00-cc-dd-01"}
    await harness.connect().enqueue("default", fields, 10)
    await complete(worker, await take_next(worker), 2)
    received = [item async for item in client.events("by-hand")]
    assert {item.envelope.traceparent for item in received} == {"00-cc-dd-01"}
    await assert_consistent(harness, **{"by-hand": text(2)})


async def test_a_refused_job_has_only_its_error_event(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    claim = await claim_next(worker)
    refusal = ErrorEvent.of(InvalidRequest.of(("model", "this worker serves echo", "other")))
    closed = await worker.take(claim, "a", Trace.of("a", claim.entry_id), lambda _: refusal)
    assert closed == Closed("refused", refusal)
    assert [item.event async for item in client.events("a")] == [refusal]
    assert await client.queue() == []
    (copy,) = await harness.connect().read("inf:worker:w1:events", "0-0", 0)
    assert copy[1]["type"] == b"error"
    await assert_consistent(harness, a=None)


async def test_an_entry_without_a_job_id_goes_to_the_dead_letters(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    await harness.connect().enqueue("default", {"p": b"\xc1"}, 10)
    await worker.dead_letter(await claim_next(worker), InvalidRequest("no readable job_id"))
    (letter,) = await client.dead_letters()
    assert (letter.payload, letter.job_id, letter.reason) == (b"\xc1", "", "no readable job_id")
    assert await client.dead_letter(letter.entry_id) == letter
    with pytest.raises(InvalidRequest):
        await client.retry_dead_letter(letter)
    assert await client.drop_dead_letter(letter.entry_id)
    assert await client.dead_letters() == []


async def test_settling_again_does_not_extend_the_keys_ttl(harness: Harness) -> None:
    client, streams, worker = harness.client(), harness.connect(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lease = await take_next(worker)
    await complete(worker, lease, 1)
    await streams.expire_job("a", 1000)
    await worker.settle(lease)
    assert ((await harness.keys())[events_key("a")] or 0) <= 1000


async def test_keys_that_have_expired_are_not_created_again(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lease = await take_next(worker)
    for key in (events_key("a"), state_key("a")):
        await harness.drop(key)
    with pytest.raises(Fenced):
        await worker.append(lease, tokens(0, 1))
    with pytest.raises(Fenced):
        await worker.finish(lease, end(0))
    await worker.renew(lease)
    with pytest.raises(Fenced):
        await worker.settle(lease)
    assert not [key for key in await harness.keys() if "{job:" in key]


async def test_status_and_worker_events_are_not_retried(harness: Harness) -> None:
    worker = await harness.transport("w1")
    lossy_worker = await harness.transport(
        "w2", LONG_LEASE, LossyStreams(harness.connect(), lambda name: name in ("add", "put_status"))
    )
    await lossy_worker.registration.publish(ErrorEvent(code="INTERNAL", message="x"))
    await lossy_worker.registration.heartbeat({"state": "ready"})
    await worker.close()


async def test_contact_is_the_last_poll_or_renewal(harness: Harness) -> None:
    worker = await harness.transport("w1")

    async def out_of_contact() -> bool:
        return worker.seconds_since_contact > 0.03

    await wait_until(out_of_contact)
    await worker.claim()
    assert worker.seconds_since_contact < 0.03
    assert abs(await worker.server_time_ms() - 1000 * time.time()) < 1000
