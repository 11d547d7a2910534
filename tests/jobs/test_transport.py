"""What the protocol promises, in memory, on fakeredis and on a real server alike: one worker, several, and death."""

from __future__ import annotations

import asyncio
import time
from itertools import count

import pytest

from tests.jobs.echo import begin, claimed, complete, end, taken, text, token, tokens
from tests.jobs.stream_checker import breaches_on, holds, keys_without_expiry
from tests.jobs.worlds import GREEDY, PATIENT, PROMPT, Lossy, World, wait_until
from worker.errors import DeadLettered, InvalidRequest
from worker.jobs.events import ErrorEvent, Started, Tokens
from worker.jobs.keys import events_key, queue_key, state_key
from worker.jobs.lease import Closed, Fenced, Policy, Renewal
from worker.jobs.protocol import Trace

pytestmark = pytest.mark.asyncio
QUEUE = queue_key("default")
DAY_MS = 24 * 3600 * 1000


async def all_is_well(world: World, **texts: str | None) -> None:
    holds(await breaches_on(world.connect(), "default", texts))
    holds(keys_without_expiry(await world.keys()))


async def test_a_job_goes_in_and_tokens_come_out(world: World) -> None:
    client, worker = world.client(), await world.transport("w1")
    job_id = await client.submit(job_id="a", prompt="hello")
    lease = await taken(worker)
    assert (lease.job_id, lease.epoch) == (job_id, 1)
    await complete(worker, lease, 5)
    received = [item async for item in client.events("a")]
    assert [item.kind for item in received] == ["started", *["token"] * 5, "end"]
    assert [item.entry_id for item in received] == [f"1-{seq}" for seq in range(7)]
    assert await client.result("a") == (text(5), end(5))
    await all_is_well(world, a=text(5))


async def test_a_finished_job_leaves_the_queue_and_its_keys_live_for_a_day(world: World) -> None:
    client, worker = world.client(), await world.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lease = await taken(worker)
    for key in (events_key("a"), state_key("a")):
        assert 6 * DAY_MS < ((await world.keys())[key] or 0) <= 7 * DAY_MS
    await complete(worker, lease, 1)
    assert await client.queue() == []
    for key in (events_key("a"), state_key("a")):
        assert 0.9 * DAY_MS < ((await world.keys())[key] or 0) <= DAY_MS


async def test_every_event_carries_its_job_epoch_worker_and_trace(world: World) -> None:
    client, worker = world.client(), await world.transport("w1")
    await client.submit(job_id="a", prompt="hello", correlation_id="mine", traceparent="00-aa-bb-01")
    await complete(worker, await taken(worker), 1)
    async for item in client.events("a"):
        envelope = item.envelope
        assert (envelope.v, envelope.job_id, envelope.epoch, envelope.worker_id) == (1, "a", 1, "w1")
        assert (envelope.correlation_id, envelope.traceparent) == ("mine", "00-aa-bb-01")
        assert envelope.ts_ms > 1.6e12


async def test_a_reader_resumes_at_any_id_without_gap_or_repetition(world: World) -> None:
    client, worker = world.client(), await world.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lease = await taken(worker)
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


async def test_a_reader_that_came_first_hears_the_answer_as_it_is_written(world: World) -> None:
    client, worker = world.client(), await world.transport("w1")
    reading = asyncio.create_task(client.result("a"))
    await client.submit(job_id="a", prompt="hello")
    await complete(worker, await taken(worker), 3)
    assert (await reading)[0] == text(3)


async def test_two_queue_entries_of_one_job_id_run_once(world: World) -> None:
    client, worker = world.client(), await world.transport("w1")
    for _ in range(3):
        await client.submit(job_id="a", prompt="hello")
    lease = await taken(worker)
    assert await begin(worker, await claimed(worker)) == Closed("duplicate")
    await complete(worker, lease, 2)
    assert await begin(worker, await claimed(worker)) == Closed("over")
    assert await client.queue() == []
    await all_is_well(world, a=text(2))


async def test_another_worker_continues_where_a_dead_one_stopped(world: World) -> None:
    client, dead = world.client(), await world.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    await dead.append(await taken(dead), tokens(0, 3))
    heir = await world.transport("w2", GREEDY)
    lease = await taken(heir)
    assert (lease.epoch, lease.history.reason) == (2, "crash")
    assert lease.history.tokens == tuple(token(i) for i in range(3))
    assert isinstance(lease.history.started, Started)
    await complete(heir, lease, 5)
    await all_is_well(world, a=text(5))


async def test_a_paused_worker_woken_after_its_lease_writes_nothing(world: World) -> None:
    client, paused = world.client(), await world.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lease = await taken(paused)
    await paused.append(lease, tokens(0, 2))
    heir = await world.transport("w2", GREEDY)
    successor = await taken(heir)
    with pytest.raises(Fenced):
        await paused.append(lease, tokens(2, 3))
    with pytest.raises(Fenced):
        await paused.finish(lease, end(3))
    assert await paused.renew(lease) is Renewal.LOST
    await paused.release(lease)
    await paused.abandon(lease, DeadLettered("the device is lost"))
    await complete(heir, successor, 4)
    with pytest.raises(Fenced):
        await paused.append(lease, tokens(3, 4))
    assert "last_error" not in await client.state("a")
    await all_is_well(world, a=text(4))


async def test_a_late_claimer_cannot_fence_the_rightful_owner(world: World) -> None:
    client, late, owner = world.client(), await world.transport("w1"), await world.transport("w2", GREEDY)
    await client.submit(job_id="a", prompt="hello")
    old = await claimed(late)
    lease = await taken(owner)
    assert await begin(late, old) == Closed("lost")
    await complete(owner, lease, 2)
    assert await begin(late, old) == Closed("over")
    await all_is_well(world, a=text(2))


async def test_the_rightful_owner_fences_a_late_claimer_that_began_first(world: World) -> None:
    client, late, owner = world.client(), await world.transport("w1"), await world.transport("w2", GREEDY)
    await client.submit(job_id="a", prompt="hello")
    old, new = await claimed(late), await claimed(owner)
    early = await begin(late, old)
    lease = await begin(owner, new)
    assert not isinstance(early, Closed)
    assert not isinstance(lease, Closed)
    with pytest.raises(Fenced):
        await late.append(early, tokens(0, 1))
    await complete(owner, lease, 2)
    await all_is_well(world, a=text(2))


async def test_what_is_published_between_a_look_and_a_take_is_not_lost(world: World) -> None:
    client, slow, takes = world.client(), await world.transport("w1"), count()
    await client.submit(job_id="a", prompt="hello")
    old = await taken(slow)

    async def the_other_still_writes(name: str) -> None:
        if name == "take" and next(takes) == 1:
            await slow.append(old, tokens(0, 1))

    heir = await world.transport("w2", GREEDY, Lossy(world.connect(), lambda _: False, the_other_still_writes))
    lease = await taken(heir)
    assert next(takes) == 3
    assert lease.history.tokens == (token(0),)
    await complete(heir, lease, 2)
    await all_is_well(world, a=text(2))


@pytest.mark.parametrize("call", ["take", "append", "settle", "renew", "expire", "job_state", "range"])
async def test_a_lost_reply_is_harmless(world: World, call: str) -> None:
    client, dead = world.client(), await world.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    await dead.append(await taken(dead), tokens(0, 2))
    turns = count()
    lossy = Lossy(world.connect(), lambda name: name == call and next(turns) % 2 == 0)
    heir = await world.transport("w2", GREEDY, lossy)
    lease = await taken(heir)
    assert lease.epoch == 2
    assert await heir.renew(lease) is Renewal.HELD
    await complete(heir, lease, 5)
    assert next(turns) > 1
    assert await client.queue() == []
    await all_is_well(world, a=text(5))


async def test_a_lost_reply_to_a_first_take_makes_no_second_epoch(world: World) -> None:
    client, turns = world.client(), count()
    worker = await world.transport("w1", PATIENT, Lossy(world.connect(), lambda n: n == "take" and next(turns) < 3))
    await client.submit(job_id="a", prompt="hello")
    lease = await taken(worker)
    assert lease.epoch == 1
    assert (await client.state("a"))["barren"] == "0"
    await complete(worker, lease, 1)
    await all_is_well(world, a=text(1))


async def test_a_lost_reply_to_a_claim_is_found_again_before_anything_new(world: World) -> None:
    client, turns = world.client(), count()
    worker = await world.transport(
        "w1", PATIENT, Lossy(world.connect(), lambda n: n == "read_new" and next(turns) == 0)
    )
    for job_id in ("a", "b"):
        await client.submit(job_id=job_id, prompt="hello")
    assert await worker.claim() is None
    first = await taken(worker)
    assert first.job_id == "a"
    second = await taken(worker)
    assert second.job_id == "b"


async def test_the_running_job_is_not_among_the_lost_replies(world: World) -> None:
    client, turns = world.client(), count()
    worker = await world.transport(
        "w1", PATIENT, Lossy(world.connect(), lambda n: n == "read_new" and next(turns) == 1)
    )
    await client.submit(job_id="a", prompt="hello")
    lease = await taken(worker)
    assert await worker.claim() is None
    assert await worker.claim() is None
    await complete(worker, lease, 1)


async def test_a_lost_reply_to_a_give_back_or_a_cancel_is_harmless(world: World) -> None:
    turns = count()
    lossy = Lossy(world.connect(), lambda name: name in ("give_back", "cancel") and next(turns) % 2 == 0)
    client, worker = world.client(), await world.transport("w1", PATIENT, lossy)
    await client.submit(job_id="a", prompt="hello")
    await worker.release(await taken(worker))
    lease = await taken(await world.transport("w2"))
    assert (lease.claim.deliveries, lease.history.reason) == (1, "drain")


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


async def test_death_between_the_terminal_event_and_the_acknowledgement_is_settled_by_another(world: World) -> None:
    client, dead, heir = world.client(), await world.transport("w1"), await world.transport("w2", GREEDY)
    await client.submit(job_id="a", prompt="hello")
    lease = await taken(dead)
    await dead.finish(lease, tokens(0, 2), end(2))
    assert await begin(heir, await claimed(heir)) == Closed("over")
    assert await client.queue() == []
    assert ((await world.keys())[events_key("a")] or 0) <= DAY_MS
    await all_is_well(world, a=text(2))


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


async def test_a_lost_reply_to_a_burial_makes_one_dead_letter(world: World) -> None:
    client, turns = world.client(), count()
    lossy = Lossy(world.connect(), lambda name: name == "settle" and next(turns) < 2)
    worker = await world.transport("w1", PATIENT, lossy)
    await world.connect().enqueue("default", {"p": b"\xc1"}, 10)
    await worker.dead_letter(await claimed(worker), InvalidRequest("no readable job_id"))
    assert next(turns) == 3
    assert len(await client.dead_letters()) == 1


async def test_a_second_settling_gives_the_keys_no_longer_life(world: World) -> None:
    client, streams, worker = world.client(), world.connect(), await world.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lease = await taken(worker)
    await complete(worker, lease, 1)
    await streams.expire(events_key("a"), 1000)
    await worker.settle(lease)
    assert ((await world.keys())[events_key("a")] or 0) <= 1000


async def test_keys_that_have_expired_are_not_created_again(world: World) -> None:
    client, worker = world.client(), await world.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lease = await taken(worker)
    for key in (events_key("a"), state_key("a")):
        await world.drop(key)
    with pytest.raises(Fenced):
        await worker.append(lease, tokens(0, 1))
    with pytest.raises(Fenced):
        await worker.finish(lease, end(0))
    await worker.renew(lease)
    await worker.settle(lease)
    assert not [key for key in await world.keys() if "{job:" in key]


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


async def test_a_give_back_counts_as_no_delivery_and_is_found_at_once(world: World) -> None:
    client = world.client()
    await client.submit(job_id="a", prompt="hello")
    for n in range(4):
        worker = await world.transport(f"w{n}")
        lease = await taken(worker)
        assert lease.claim.deliveries == 1
        assert lease.history.handed_back == (n > 0)
        await worker.append(lease, tokens(n, n + 1))
        await worker.release(lease)
    worker = await world.transport("w4")
    await complete(worker, await taken(worker), 4)
    await all_is_well(world, a=text(4))


async def test_a_claim_can_be_given_back_before_it_is_begun(world: World) -> None:
    client, worker = world.client(), await world.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    await worker.release(await claimed(worker))
    other = await world.transport("w2")
    lease = await taken(other)
    assert (lease.epoch, lease.claim.deliveries) == (1, 1)


async def test_a_failing_worker_leaves_its_job_at_once_and_says_why(world: World) -> None:
    client, failing = world.client(), await world.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lease = await taken(failing)
    await failing.append(lease, tokens(0, 1))
    await failing.abandon(lease, DeadLettered("the device is lost"))
    assert (await client.state("a"))["last_error"] == "DEAD_LETTERED"
    heir = await world.transport("w2")
    lease = await taken(heir)
    assert (lease.history.reason, lease.claim.deliveries) == ("crash", 2)
    await complete(heir, lease, 2)
    await all_is_well(world, a=text(2))


async def test_a_consumer_is_deleted_only_when_nothing_is_pending_for_it(world: World) -> None:
    client, streams = world.client(), world.connect()
    await client.submit(job_id="a", prompt="hello")
    holder = await world.transport("w1")
    await claimed(holder)
    assert await streams.remove_consumers("default", "w1", 0) == 0
    heir = await world.transport("w2", GREEDY)
    lease = await taken(heir)
    assert await streams.remove_consumers("default", None, 60_000) == 0
    assert await streams.remove_consumers("default", "w1", 0) == 1
    assert await streams.remove_consumers("default", None, 0) == 0
    await complete(heir, lease, 1)
    assert await streams.remove_consumers("default", None, 0) == 1


async def test_a_job_with_missing_events_ends_with_an_error(world: World) -> None:
    client, dead = world.client(), await world.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    await dead.append(await taken(dead), tokens(0, 2))
    await world.trim(events_key("a"))
    heir = await world.transport("w2", GREEDY)
    closed = await begin(heir, await claimed(heir))
    assert isinstance(closed, Closed)
    assert closed.error is not None
    assert (closed.reason, closed.error.code) == ("refused", "INTERNAL")
    (only,) = [item async for item in client.events("a")]
    assert only.entry_id == "2-0"


async def test_a_refused_job_has_its_error_alone(world: World) -> None:
    client, worker = world.client(), await world.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    claim = await claimed(worker)
    refusal = ErrorEvent.of(InvalidRequest.of(("model", "this worker serves echo", "other")))
    closed = await worker.take(claim, "a", Trace.of("a", claim.entry_id), lambda _: refusal)
    assert closed == Closed("refused", refusal)
    assert [item.event async for item in client.events("a")] == [refusal]
    assert await client.queue() == []
    (copy,) = await world.connect().read("inf:worker:w1:events", "0-0", 0)
    assert copy[1]["type"] == b"error"
    await all_is_well(world, a=None)


async def test_an_entry_that_names_no_job_goes_to_the_dead_letters(world: World) -> None:
    client, worker = world.client(), await world.transport("w1")
    await world.connect().enqueue("default", {"p": b"\xc1"}, 10)
    await worker.dead_letter(await claimed(worker), InvalidRequest("no readable job_id"))
    (letter,) = await client.dead_letters()
    assert (letter.payload, letter.job_id, letter.reason) == (b"\xc1", "", "no readable job_id")
    assert await client.dead_letter(letter.entry_id) == letter
    with pytest.raises(InvalidRequest):
        await client.retry_dead_letter(letter)
    assert await client.drop_dead_letter(letter.entry_id)
    assert await client.dead_letters() == []


async def test_a_json_payload_added_by_hand_is_a_job(world: World) -> None:
    client, worker = world.client(), await world.transport("w1")
    fields = {"p": b'{"job_id": "by-hand", "prompt": "hello", "max_tokens": 2}', "traceparent": b"00-cc-dd-01"}
    await world.connect().enqueue("default", fields, 10)
    await complete(worker, await taken(worker), 2)
    received = [item async for item in client.events("by-hand")]
    assert {item.envelope.traceparent for item in received} == {"00-cc-dd-01"}
    await all_is_well(world, **{"by-hand": text(2)})


async def test_a_worker_that_died_is_noticed_within_its_lease_and_a_scan(world: World) -> None:
    client, dead = world.client(), await world.transport("w1", PROMPT)
    await client.submit(job_id="a", prompt="hello")
    await taken(dead)
    heir = await world.transport("w2", PROMPT)
    assert await heir.claim() is None
    found = []

    async def taken_over() -> bool:
        found.append(await heir.claim())
        return found[-1] is not None

    await wait_until(taken_over, timeout_s=1.0)


async def test_a_renewed_lease_is_not_taken_over(world: World) -> None:
    client, owner = world.client(), await world.transport("w1", PROMPT)
    await client.submit(job_id="a", prompt="hello")
    lease = await taken(owner)
    other = await world.transport("w2", PROMPT)
    for _ in range(6):
        assert await owner.renew(lease) is Renewal.HELD
        assert await other.claim() is None
    assert lease.claim.deliveries == (await world.connect().pending("default", 1))[0].deliveries == 1


async def test_after_a_lost_connection_there_is_one_lease_of_silence(world: World) -> None:
    client, dead, turns = world.client(), await world.transport("w1", PROMPT), count()
    await client.submit(job_id="a", prompt="hello")
    await taken(dead)
    lossy = Lossy(world.connect(), lambda name: name == "read_own" and next(turns) == 0)
    heir = await world.transport("w2", Policy(lease_s=0.3, scan_s=0.02), lossy)

    async def its_lease_is_long_over() -> bool:
        return (await world.connect().pending("default", 1))[0].idle_ms > 300

    await wait_until(its_lease_is_long_over)
    assert await heir.claim() is None
    loop = asyncio.get_running_loop()
    since = loop.time()

    async def taken_over() -> bool:
        return await heir.claim() is not None

    await wait_until(taken_over)
    assert loop.time() - since > 0.25


async def test_many_workers_run_every_job_once(world: World) -> None:
    client = world.client()
    workers = [await world.transport(f"w{n}", PATIENT) for n in range(4)]
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
    await all_is_well(world, **jobs)


async def test_an_answer_can_be_long(world: World) -> None:
    client, worker = world.client(), await world.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lease = await taken(worker)
    for first in range(0, 2500, 2):
        await worker.append(lease, tokens(first, first + 2))
    heir = await world.transport("w2", GREEDY)
    lease = await taken(heir)
    assert len(lease.history.tokens) == 2500
    await complete(heir, lease, 2501)
    await all_is_well(world, a=text(2501))


async def test_an_append_that_was_cancelled_leaves_its_events_for_the_next(world: World) -> None:
    client = world.client()
    turns = count()

    def dies(name: str) -> bool:
        if name == "append" and next(turns) == 0:
            raise asyncio.CancelledError
        return False

    worker = await world.transport("w1", PATIENT, Lossy(world.connect(), dies))
    await client.submit(job_id="a", prompt="hello")
    lease = await taken(worker)
    with pytest.raises(asyncio.CancelledError):
        await worker.append(lease, tokens(0, 1))
    await worker.append(lease, tokens(1, 2))
    await complete(worker, lease, 2)
    await all_is_well(world, a=text(2))


async def test_an_index_out_of_turn_is_refused_before_it_is_written(world: World) -> None:
    client, worker = world.client(), await world.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lease = await taken(worker)
    with pytest.raises(ValueError, match="token 1 where 0 is the next"):
        await worker.append(lease, tokens(1, 2))
    with pytest.raises(ValueError, match="tokens ends no job"):
        await worker.finish(lease, Tokens(tokens=(token(0),)))
    await complete(worker, lease, 1)
    await all_is_well(world, a=text(1))


async def test_a_server_that_lost_its_last_writes_gets_them_again_with_the_same_ids(world: World) -> None:
    client, worker = world.client(), await world.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lease = await taken(worker)
    await worker.append(lease, tokens(0, 2))
    restore = await world.snapshot(events_key("a"), state_key("a"))
    await worker.append(lease, tokens(2, 3))
    await worker.append(lease, tokens(3, 4))
    before = await world.connect().range(events_key("a"), "-", "+", 10)
    await restore()
    await complete(worker, lease, 5)
    assert (await world.connect().range(events_key("a"), "-", "+", 10))[:4] == before
    await all_is_well(world, a=text(5))


async def test_a_server_that_lost_a_take_gets_it_again_unless_another_took(world: World) -> None:
    client, dead = world.client(), await world.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    await dead.append(await taken(dead), tokens(0, 2))
    restore = await world.snapshot(events_key("a"), state_key("a"))
    first = await world.transport("w2", GREEDY)
    lease = await taken(first)
    await first.append(lease, tokens(2, 3))
    await restore()
    await first.append(lease, tokens(3, 4))
    assert (await client.state("a"))["epoch"] == "2"
    await restore()
    second = await world.transport("w3", GREEDY)
    other = await taken(second)
    assert other.epoch == lease.epoch == 2
    with pytest.raises(Fenced):
        await first.append(lease, tokens(4, 5))
    await complete(second, other, 5)
    await all_is_well(world, a=text(5))


async def test_an_entry_deleted_by_hand_while_it_was_pending_is_forgotten(world: World) -> None:
    client, turns = world.client(), count()
    lossy = Lossy(world.connect(), lambda name: name == "read_new" and next(turns) == 0)
    worker = await world.transport("w1", PATIENT, lossy)
    await client.submit(job_id="a", prompt="hello")
    assert await worker.claim() is None
    (row,) = await client.queue()
    await world.connect().delete(QUEUE, row.entry_id)
    assert await worker.claim() is None
    assert await world.connect().pending("default", 10) == []


async def test_a_new_worker_sweeps_out_consumers_that_nobody_has_seen(world: World) -> None:
    gone = await world.transport("w1")
    await gone.claim()
    assert await world.connect().remove_consumers("default", "w1", 3_600_000) == 0
    await (await world.transport("w2")).claim()
    assert await world.connect().remove_consumers("default", None, 0) == 2


async def test_commands_are_heard_again_after_an_outage(world: World) -> None:
    turns = count()
    lossy = Lossy(world.connect(), lambda name: name == "read" and next(turns) == 0)
    worker = await world.transport("w1", PATIENT, lossy)
    hearing = asyncio.ensure_future(anext(worker.presence.commands()))
    await world.client().drain("w1")
    assert (await hearing).target == "w1"


async def test_what_is_only_to_be_seen_is_never_waited_for(world: World) -> None:
    worker = await world.transport("w1")
    deaf = await world.transport("w2", PATIENT, Lossy(world.connect(), lambda name: name in ("add", "put_status")))
    await deaf.presence.publish(ErrorEvent(code="INTERNAL", message="x"))
    await deaf.presence.heartbeat({"state": "ready"})
    await worker.close()


async def test_silence_is_the_time_since_the_last_poll_or_renewal(world: World) -> None:
    worker = await world.transport("w1")

    async def silent() -> bool:
        return worker.silence_s > 0.03

    await wait_until(silent)
    await worker.claim()
    assert worker.silence_s < 0.03
    assert abs(await worker.server_ms() - 1000 * time.time()) < 1000
