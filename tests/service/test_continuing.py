"""An answer that several workers write: whatever ends an attempt, the reader sees what one would have written."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.jobs.echo import claim_next
from tests.jobs.harness import FakeRedisHarness, wait_until
from tests.jobs.stream_checker import assert_none, find_violations
from tests.service.serving import QUICK, Gate, Model, Scripted, published, serving, story
from tests.service.test_answers import undisturbed
from worker.config import LeaseSection
from worker.jobs.events import End, Resumed, Started, Tokens
from worker.jobs.lease import History, Lease
from worker.jobs.protocol import Trace, decode_job
from worker.jobs.transport import Transport
from worker.service.question import Question

FIELDS = {"prompt": "hello harness", "seed": 7, "temperature": 0.8, "max_tokens": 12, "ignore_eos": True, "logprobs": 2}


async def first_worker(harness, served, tokens, *, job_id="a"):
    """An attempt that publishes these tokens and then dies; its lease has ended already."""
    transport = Transport(harness.connect(), "first", lease=LeaseSection(lease_s=60, scan_s=0.02))
    await transport.open()
    claim = await claim_next(transport)
    job = decode_job(claim.payload)
    question = Question.of(job, served, claim.entry_id, claim.enqueued_ms)
    trace = Trace.of(job_id, claim.entry_id, job, claim.traceparent)
    lease = await transport.take(claim, job_id, trace, lambda history: question.opening(served, history, 1))
    assert isinstance(lease, Lease)
    if tokens:
        await transport.append(lease, Tokens(tokens=tuple(tokens)))
    await harness.connect().give_back("default", "first", claim.entry_id, 60_000, 1)
    return transport, lease


@pytest.mark.parametrize("name", ["qwen2", "gpt-oss"])
async def test_an_answer_is_continued_at_every_possible_token(model, name):
    made = model(name)
    whole = undisturbed(made, **FIELDS)
    for cut in range(len(whole) + 1):
        harness = FakeRedisHarness()
        client = harness.client()
        await client.submit(job_id="a", **FIELDS)
        await first_worker(harness, made.fresh(), whole[:cut])
        async with serving(harness, made.fresh()):
            told = await story(client, "a")
            assert_none(await find_violations(harness.connect(), "default", {"a": "".join(t.t for t in whole)}))
        assert told.tokens == whole, f"cut at {cut}"
        resumed = told.of("resumed")[0]
        assert (resumed.from_i, resumed.reason, resumed.exact) == (cut, "crash", True)
        assert told.last.tokens_out == len(whole)
        await harness.close()


async def test_a_stop_string_that_began_before_the_crash_is_found_after_it(fake, model):
    fields = {**FIELDS, "max_tokens": 40}
    whole = undisturbed(model(), **fields)
    at = next(i for i in range(5, 39) if whole[i].t and whole[i + 1].t)
    stop = whole[at].t + whole[at + 1].t
    expected = undisturbed(model(), **fields, stop=[stop])
    client = fake.client()
    await client.submit(job_id="a", **fields, stop=[stop])
    await first_worker(fake, model().fresh(), expected[:-1])
    async with serving(fake, model().fresh()):
        told = await story(client, "a")
    assert told.tokens == expected
    assert told.last.stop_sequence == stop


async def test_where_all_tokens_are_published_only_the_end_is_missing(harness, model):
    whole = undisturbed(model(), **FIELDS)
    client = harness.client()
    await client.submit(job_id="a", **FIELDS)
    await first_worker(harness, model().fresh(), whole)
    runner = Scripted(model().runner, lambda step: None)
    async with serving(harness, model().fresh(runner)):
        told = await story(client, "a")
    assert runner.steps == 0
    assert told.kinds == ["started", "token", "resumed", "end"]
    assert isinstance(told.last, End)
    assert told.last.tokens_out == len(whole)


@pytest.mark.parametrize("changed", ["fingerprint", "prompt_hash"])
async def test_another_model_or_prompt_continues_inexactly(fake, model, changed):
    client, served = fake.client(), model().fresh()
    await client.submit(job_id="a", **FIELDS)
    transport = Transport(fake.connect(), "first", lease=LeaseSection(lease_s=60, scan_s=0.02))
    await transport.open()
    claim = await claim_next(transport)
    job = decode_job(claim.payload)
    opening = Question.of(job, served, claim.entry_id, claim.enqueued_ms).opening(served, History(), 1)
    other = Started(**{**opening.to_fields(), changed: "another"})
    assert isinstance(await transport.take(claim, "a", Trace.of("a", claim.entry_id, job), lambda _: other), Lease)
    await fake.connect().give_back("default", "first", claim.entry_id, 60_000, 1)
    async with serving(fake, model().fresh()):
        told = await story(client, "a")
    assert not told.of("resumed")[0].exact
    assert told.kinds[-1] == "end"


async def test_what_was_resolved_at_the_start_holds_for_later_attempts(fake):
    """The second worker's longer context would leave more tokens, but the answer has begun."""
    client, small, large = fake.client(), Model.echo(64), Model.echo(128)
    await client.submit(job_id="a", prompt="abc")
    await first_worker(fake, small.fresh(), undisturbed(small, prompt="abc")[:-3])
    async with serving(fake, large.fresh()):
        told = await story(client, "a")
    assert told.of("started")[0].max_tokens == 61 == told.last.tokens_out


async def test_an_answer_that_does_not_fit_here_is_refused(fake):
    client, large, small = fake.client(), Model.echo(4096), Model.echo(64)
    await client.submit(job_id="a", prompt="abc", max_tokens=1000)
    await first_worker(fake, large.fresh(), [])
    async with serving(fake, small.fresh()):
        told = await story(client, "a")
    assert told.last.code == "INVALID_REQUEST"
    assert told.kinds == ["started", "error"]


async def test_ids_of_another_vocabulary_are_refused(fake, model):
    client = fake.client()
    await client.submit(job_id="a", prompt_tokens=[300, 301], max_tokens=20, ignore_eos=True)
    whole = undisturbed(model("phi3"), prompt_tokens=[300, 301], max_tokens=20, ignore_eos=True, temperature=0)
    large = [token for token in whole if token.id >= 300] or whole
    await first_worker(fake, model("phi3").fresh(), [type(t)(i, 400, t.t) for i, t in enumerate(large[:2])])
    async with serving(fake, model().fresh()):
        told = await story(client, "a")
    assert told.last.code == "INVALID_REQUEST"


async def test_a_drain_without_time_hands_the_job_over_at_once(harness):
    client, model = harness.client(), Model.echo()
    slow = Scripted(model.runner, lambda step: time.sleep(0.01))
    lease = LeaseSection(lease_s=8, renew_s=1, scan_s=0.05)
    async with serving(harness, model.fresh(slow), name="w1", grace_s=0.2, lease=lease) as one:
        await client.submit(job_id="a", prompt="abc", max_tokens=300)
        await wait_until(lambda: _longer_than(harness, "a", 5))
        async with serving(harness, Model.echo().fresh(), name="w2", lease=lease):
            one.service.signal("test")
            assert await asyncio.wait_for(one.task, 5) == 0
            began = time.monotonic()
            told = await story(client, "a")
            assert time.monotonic() - began < 3, "a handed over job does not wait for its lease"
    assert told.text == "abc" * 100
    assert [(r.reason, r.exact) for r in told.of("resumed")] == [("drain", True)]
    assert one.logged("job_let_go")[0]["outcome"] == "handed_back"


async def _longer_than(harness, job_id, count):
    return len((await published(harness, job_id)).ids) > count


async def test_a_drain_with_time_finishes_the_job_and_takes_no_other(harness):
    client, model = harness.client(), Model.echo()
    slow = Scripted(model.runner, lambda step: time.sleep(0.01))
    async with serving(harness, model.fresh(slow), name="w1") as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=60)
        await client.submit(job_id="b", prompt="abc", max_tokens=60)
        await wait_until(lambda: _longer_than(harness, "a", 5))
        assert await worker.stop() == 0
    assert (await published(harness, "a")).kinds == ["started", "token", "end"]
    assert (await published(harness, "b")).items == []
    assert [entry.job_id for entry in await client.queue()] == ["b"]


async def test_many_hand_overs_are_no_failed_attempts(fake):
    client, model = fake.client(), Model.echo()
    slow = Scripted(model.runner, lambda step: time.sleep(0.02))
    await client.submit(job_id="a", prompt="abc", max_tokens=100)
    for n in range(5):
        async with serving(fake, model.fresh(slow), name=f"w{n}", grace_s=0.0) as worker:

            async def holds_it(name=f"w{n}"):
                state = await client.state("a")
                return (state.get("worker"), state.get("state")) == (name, "running")

            await wait_until(holds_it)
            await worker.stop()
    async with serving(fake, Model.echo().fresh(), name="last"):
        told = await story(client, "a")
    assert told.text == "abc" * 33 + "a"
    assert {r.reason for r in told.of("resumed")} == {"drain"}


async def test_a_worker_that_lost_its_entry_drops_the_job_and_goes_on(harness):
    """As after a pause: by its next word somebody else has begun an epoch."""
    client, gate, model = harness.client(), Gate(at=5), Model.echo()
    sleepy = LeaseSection(lease_s=60, renew_s=30, scan_s=0.05)
    async with serving(harness, model.fresh(Scripted(model.runner, gate.script)), name="w1", lease=sleepy) as one:
        await client.submit(job_id="a", prompt="abc", max_tokens=30)
        await gate.until_reached()
        entry = (await client.queue())[0]
        await harness.connect().give_back("default", "w1", entry.entry_id, 60_000, 1)
        async with serving(harness, Model.echo().fresh(), name="w2"):
            told = await story(client, "a")
        gate.open()
        await wait_until(lambda: _dropped(one))
        assert [(i.entry_id, i.event) for i in (await published(harness, "a")).items] == [
            (i.entry_id, i.event) for i in told.items
        ]
        assert told.text == "abc" * 10
        assert one.engine.idle
        assert one.logged("job_let_go")[0]["outcome"] == "fenced"
        await client.submit(job_id="b", prompt="abc", max_tokens=3)
        assert (await story(client, "b")).text == "abc"
    assert_none(await find_violations(harness.connect(), "default", {"a": "abc" * 10, "b": "abc"}))


async def test_a_renewal_that_finds_another_owner_stops_the_job_at_once(harness):
    client, model = harness.client(), Model.echo()
    slow = Scripted(model.runner, lambda step: time.sleep(0.02))
    async with serving(harness, model.fresh(slow), name="w1") as one:
        await client.submit(job_id="a", prompt="abc", max_tokens=1000)
        await wait_until(lambda: _longer_than(harness, "a", 3))
        _, entry = await harness.connect().reclaim("default", "thief", 0, "0-0")
        assert entry is not None
        await wait_until(lambda: _dropped(one))
        assert one.logged("job_let_go")[0]["outcome"] == "lost"
        assert one.engine.idle
        assert (await published(harness, "a")).kinds == ["started", "token"]
        assert [held.worker for held in await client.queue()] == ["thief"], "it was not acknowledged"


async def _dropped(worker):
    return bool(worker.logged("job_let_go"))


async def test_replay_counts_as_life_for_the_watchdog_and_not_against_the_timeout(fake):
    client, model = fake.client(), Model.echo()
    served = model.fresh(Scripted(model.runner, lambda step: time.sleep(0.02)))
    whole = undisturbed(model, prompt="abc", max_tokens=60)
    await client.submit(job_id="a", prompt="abc", max_tokens=60)
    await first_worker(fake, model.fresh(), whole[:50])
    async with serving(fake, served, inference_timeout_s=0.6, stall_s=0.6):
        told = await story(client, "a")
    assert told.kinds[-1] == "end", "50 replayed tokens take a second, the ten that count a fifth of it"
    assert isinstance(told.of("resumed")[0], Resumed)


async def test_a_job_whose_keys_are_gone_is_dropped(fake):
    client, gate, model = fake.client(), Gate(at=5), Model.echo()
    async with serving(fake, model.fresh(Scripted(model.runner, gate.script)), lease=QUICK) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=30)
        await gate.until_reached()
        await wait_until(lambda: _longer_than(fake, "a", 1))
        for key in ("events", "state"):
            await fake.drop(f"inf:{{job:a}}:{key}")
        gate.open()
        await wait_until(lambda: _dropped(worker))
        assert worker.logged("job_let_go")[0]["outcome"] == "fenced"
        assert "inf:{job:a}:events" not in await fake.keys()
