"""The client: submitting, the queue's bound, reading, dead letters, workers and their events."""

from __future__ import annotations

import asyncio

import msgpack
import pytest

from tests.jobs.echo import begin, claim_next, complete, end, take_next, text, tokens
from tests.jobs.harness import LONG_LEASE, Harness, LossyStreams, lease_settings, wait_until
from worker.errors import InvalidRequest, QueueFull
from worker.jobs import consumer
from worker.jobs.client import Client
from worker.jobs.events import ErrorEvent, Ready, Token, Tokens
from worker.jobs.keys import events_key, queue_key
from worker.jobs.lease import Closed
from worker.jobs.reader import JobFailed
from worker.jobs.streams import Disconnected


async def test_a_full_queue_reports_when_to_retry(harness: Harness) -> None:
    client, worker = harness.client(bound=3, retry_after_s=0.7), await harness.transport("w1")
    accepted = await asyncio.gather(
        *(client.submit(job_id=f"j{n}", prompt="hello") for n in range(8)), return_exceptions=True
    )
    assert sum(isinstance(reply, str) for reply in accepted) == 3
    refused = [reply for reply in accepted if isinstance(reply, QueueFull)]
    assert [error.retry_after_s for error in refused] == [0.7] * 5
    lease = await take_next(worker)
    with pytest.raises(QueueFull):
        await client.submit(prompt="a running job still counts")
    await complete(worker, lease, 0)
    assert len(await client.submit(prompt="now there is room")) == 32


async def test_a_job_is_validated_before_it_is_sent(harness: Harness) -> None:
    client = harness.client()
    with pytest.raises(InvalidRequest) as caught:
        await client.submit(prompt="hello", temperature=3, top_k="all", tempo=1)
    assert {error["field"] for error in caught.value.details["errors"]} == {"temperature", "top_k", "tempo"}
    with pytest.raises(InvalidRequest):
        await client.submit(prompt="x" * (8 * 2**20))
    assert await client.queue() == []


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"top_k": 2**64}, "top_k"),
        ({"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"a": [1, -(2**63) - 1]}}, None),
    ],
)
async def test_integers_that_msgpack_cannot_represent_are_refused_by_name(harness: Harness, fields, field) -> None:
    client = harness.client()
    with pytest.raises(InvalidRequest) as caught:
        await client.submit(**({"prompt": "hello"} if "messages" not in fields else {}), **fields)
    names = [error["field"] for error in caught.value.details["errors"]]
    assert names == [field or "chat_template_kwargs.a.1"]
    assert await client.queue() == []


async def test_the_queue_lists_the_worker_of_each_job(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    for job_id in ("a", "b"):
        await client.submit(job_id=job_id, prompt="hello")
    await claim_next(worker)
    rows = await client.queue()
    assert [(row.job_id, row.worker, row.deliveries) for row in rows] == [("a", "w1", 1), ("b", None, 0)]


async def test_a_dead_letter_is_retried_under_a_new_id(harness: Harness) -> None:
    client, settings = harness.client(), lease_settings(lease_s=0.0, scan_s=0.02, max_attempts=1)
    await client.submit(job_id="a", prompt="hello", logit_bias={5: 1.0}, seed=7)
    await take_next(await harness.transport("w1", settings))
    last = await harness.transport("w2", settings)
    assert isinstance(await begin(last, await claim_next(last)), Closed)
    (letter,) = await client.dead_letters()
    assert await client.retry_dead_letter(letter) == "a.r1"
    assert await client.dead_letters() == []
    lease = await take_next(last)
    assert lease.job_id == "a.r1"
    assert msgpack.unpackb(lease.claim.payload, strict_map_key=False)["seed"] == 7
    await complete(last, lease, 1)


async def test_dead_letters_without_a_job_id_are_retried_under_different_ids(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    for _ in range(2):
        await harness.connect().enqueue("default", {"p": b'{"prompt": "hello"}'}, 10)
        await worker.dead_letter(await claim_next(worker), InvalidRequest("no readable job_id"))
    ids = {await client.retry_dead_letter(letter) for letter in await client.dead_letters()}
    assert ids == {entry.job_id for entry in await client.queue()}
    assert len(ids) == 2
    assert await client.dead_letters() == []


async def test_an_error_ends_the_iteration_over_tokens(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lease = await take_next(worker)
    await worker.finish(lease, tokens(0, 2), ErrorEvent(code="VRAM_OOM", message="full", retriable=True))
    received: list[Token] = []
    with pytest.raises(JobFailed, match="VRAM_OOM: full") as caught:  # noqa: PT012
        async for token in client.tokens("a"):
            received.append(token)  # noqa: PERF401  # what came before the error counts
    assert "".join(token.t for token in received) == text(2)
    assert caught.value.error.retriable
    with pytest.raises(JobFailed):
        await client.result("a")


async def test_the_result_is_the_text_of_the_channel_final(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    published = Tokens(
        tokens=(
            Token(0, 100, "hm", channel="reasoning"),
            Token(1, 101, "yes"),
            Token(2, 102, "{}", channel="tool", recipient="functions.f", call=0),
        )
    )
    await worker.finish(await take_next(worker), published, end(3))
    assert (await client.result("a"))[0] == "yes"
    received = [token async for token in client.tokens("a")]
    assert received == list(published.tokens)


async def test_readers_ignore_unknown_event_types(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    await complete(worker, await take_next(worker), 1)
    await harness.connect().add(events_key("b"), {"type": b"of_the_future", "p": b"\xc1"}, 10, 60_000)
    await client.submit(job_id="b", prompt="hello")
    await client.cancel("b")
    assert [item.kind async for item in client.events("b")] == ["error"]


async def test_a_reader_of_an_unknown_job_times_out_after_idle_s(harness: Harness) -> None:
    with pytest.raises(TimeoutError, match="no event of job a"):
        await anext(harness.client().events("a", idle_s=0.05))


async def test_state_and_last_id_are_read_atomically(harness: Harness) -> None:
    """Otherwise a reader at the last entry could miss the `end` that is written meanwhile."""
    client, worker, seen = harness.client(), await harness.transport("w1"), []
    await client.submit(job_id="a", prompt="hello")
    lease, looking = await take_next(worker), harness.connect()

    async def look() -> None:
        while "ended_ms" not in (state := await looking.job_state("a")).fields:
            seen.append((state.last_id, int(state.fields["tokens"])))
            await asyncio.sleep(0)

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(look())
        for i in range(100):
            await worker.append(lease, tokens(i, i + 1))
            await asyncio.sleep(0)
        await complete(worker, lease, 100)
    assert len({last_id for last_id, _ in seen}) > 10
    assert all(last_id == f"1-{count}" for last_id, count in seen)


async def test_a_reader_retries_after_lost_replies_for_a_limited_time(harness: Harness) -> None:
    worker = await harness.transport("w1")
    lost = iter([True, False, True])
    flaky = Client(LossyStreams(harness.connect(), lambda name: name == "read" and next(lost, False)))
    await flaky.submit(job_id="a", prompt="hello")
    await complete(worker, await take_next(worker), 2)
    assert (await flaky.result("a"))[0] == text(2)
    cut = Client(LossyStreams(harness.connect(), lambda name: True), reconnect_timeout_s=0.1)
    with pytest.raises(Disconnected):
        await cut.result("a")


async def test_a_reader_waits_for_longer_than_an_outage_of_half_a_minute(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, away = [], True

    def is_lost(name: str) -> bool:
        calls.append(name)
        return away and name in ("read", "read_many")

    client, worker = Client(LossyStreams(harness.connect(), is_lost)), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    await complete(worker, await take_next(worker), 2)
    reading = asyncio.create_task(client.result("a"))

    async def read_again() -> bool:
        return calls.count("read_many") + calls.count("read") > 1

    await wait_until(read_again)
    loop = asyncio.get_running_loop()
    clock = loop.time
    monkeypatch.setattr(loop, "time", lambda: clock() + 40)
    calls.clear()
    await wait_until(read_again)
    away = False
    assert (await reading)[0] == text(2)


async def test_a_live_worker_is_listed_with_its_status_until_it_leaves_or_stops_sending_heartbeats(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = harness.client()
    leaving, silent = await harness.transport("w1"), await harness.transport("w2")
    for worker, ttl_ms in ((leaving, consumer.STATUS_TTL_MS), (silent, 50)):
        monkeypatch.setattr(consumer, "STATUS_TTL_MS", ttl_ms)
        await worker.registration.heartbeat({"state": "ready", "model": "echo"})
    assert (await client.workers())["w1"] == {"state": "ready", "model": "echo"}

    async def silent_worker_is_gone() -> bool:
        return set(await client.workers()) == {"w1"}

    await wait_until(silent_worker_is_gone)
    await harness.transport("w1", LONG_LEASE)
    await leaving.registration.close()
    assert await client.workers() == {}


async def test_a_worker_s_own_events_can_be_followed(harness: Harness) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    ready = Ready(model="echo", fingerprint="echo-1", context=4096, load_ms=1.0)
    await worker.registration.publish(ready)
    following = client.worker_events("w1")
    first = await anext(following)
    assert (first.event, first.envelope.worker_id, first.envelope.job_id) == (ready, "w1", None)
    await worker.registration.publish(ready)
    assert (await anext(following)).entry_id > first.entry_id
    await following.aclose()


async def test_a_worker_s_own_stream_keeps_its_newest_events_and_expires(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer, "MAX_EVENTS", 10)
    worker = await harness.transport("w1")
    for n in range(400):
        await worker.registration.publish(Ready(model=str(n), fingerprint="", context=1, load_ms=0.0))
    streams = harness.connect()
    kept = await streams.range("inf:worker:w1:events", "-", "+", 1000)
    assert 10 <= len(kept) < 200
    assert (await harness.keys())["inf:worker:w1:events"] is not None


async def test_a_drain_command_names_its_worker(harness: Harness) -> None:
    worker = await harness.transport("w1")
    next_command = asyncio.ensure_future(anext(worker.registration.commands()))
    await harness.client().drain("w1")
    command = await next_command
    assert (command.do, command.target) == ("drain", "w1")


async def test_commands_sent_before_a_worker_opened_are_ignored(harness: Harness) -> None:
    await harness.client().drain("w1")
    worker = await harness.transport("w1")
    next_command = asyncio.ensure_future(anext(worker.registration.commands()))
    await harness.client().drain("w2")
    assert (await next_command).target == "w2"


async def test_a_submitted_job_carries_the_version_that_its_fields_need(harness: Harness) -> None:
    client = harness.client()
    await client.submit(prompt="x", logprobs=1)
    await client.submit(prompt="x", logprobs=1, token_bytes=True)
    entries = await harness.connect().range(queue_key("default"), "-", "+", 10)
    assert [msgpack.unpackb(fields["p"]).get("v") for _, fields in entries] == [None, 2]
