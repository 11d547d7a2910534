"""However an attempt ends, the next worker publishes what a single worker would have."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.jobs.harness import FakeRedisHarness, wait_until
from tests.jobs.stream_checker import assert_none, find_violations
from tests.service.jobs import SAMPLED_JOB, crashed_attempt, reference_tokens
from tests.service.models import ScriptedRunner, SharedModel, StepBarrier
from tests.service.serving import LONG_LEASE, SHORT_LEASE, published_events, read_job, run_job, serving
from worker.config import LeaseSection
from worker.jobs.events import End, Resumed, Started, encode_event
from worker.jobs.keys import WORKERS, queue_key
from worker.jobs.protocol import Job, Trace
from worker.jobs.reader import History
from worker.service.prepared_job import PreparedJob


@pytest.mark.parametrize("name", ["qwen2", "gpt-oss"])
async def test_an_answer_is_continued_at_every_possible_token(model, name):
    shared = model(name)
    whole = reference_tokens(shared, **SAMPLED_JOB)
    for cut in range(len(whole) + 1):
        harness = FakeRedisHarness()
        client = harness.client()
        await client.submit(job_id="a", **SAMPLED_JOB)
        await crashed_attempt(harness, shared.fresh(), whole[:cut])
        async with serving(harness, shared.fresh()):
            result = await read_job(client, "a")
            assert_none(await find_violations(harness.connect(), "default", {"a": "".join(t.t for t in whole)}))
        assert result.tokens == whole, f"cut at {cut}"
        resumed = result.of("resumed")[0]
        assert (resumed.from_i, resumed.reason, resumed.exact) == (cut, "crash", True)
        assert result.last.tokens_out == len(whole)
        await harness.close()


async def test_a_stop_string_that_began_before_the_crash_is_found_after_it(fake, model):
    fields = {**SAMPLED_JOB, "max_tokens": 40}
    whole = reference_tokens(model(), **fields)
    at = next(i for i in range(5, 39) if whole[i].t and whole[i + 1].t)
    stop = whole[at].t + whole[at + 1].t
    expected = reference_tokens(model(), **fields, stop=[stop])
    client = fake.client()
    await client.submit(job_id="a", **fields, stop=[stop])
    await crashed_attempt(fake, model().fresh(), expected[:-1])
    async with serving(fake, model().fresh()):
        result = await read_job(client, "a")
    assert result.tokens == expected
    assert result.last.stop_sequence == stop


async def test_if_all_tokens_are_published_only_the_end_is_added(harness, model):
    whole = reference_tokens(model(), **SAMPLED_JOB)
    client = harness.client()
    await client.submit(job_id="a", **SAMPLED_JOB)
    await crashed_attempt(harness, model().fresh(), whole)
    runner = ScriptedRunner(model().runner, lambda step: None)
    async with serving(harness, model().fresh(runner)):
        result = await read_job(client, "a")
    assert runner.steps == 0
    assert result.kinds == ["started", "token", "resumed", "end"]
    assert isinstance(result.last, End)
    assert result.last.tokens_out == len(whole)


class OldStarted(Started):
    """A `started` event of a worker that has no numerics id."""

    def to_fields(self):
        return {name: value for name, value in super().to_fields().items() if name != "numerics"}


def with_another(field):
    return lambda started: Started(**{**started.to_fields(), field: "another"})


@pytest.mark.parametrize(
    "first",
    [*map(with_another, ("fingerprint", "prompt_hash", "numerics")), lambda started: OldStarted(**started.to_fields())],
    ids=["fingerprint", "prompt hash", "numerics", "old stream"],
)
async def test_another_model_prompt_or_numerics_id_continues_with_exact_false(fake, model, first):
    client = fake.client()
    await client.submit(job_id="a", **SAMPLED_JOB)
    await crashed_attempt(fake, model().fresh(), [], started=first)
    async with serving(fake, model().fresh()):
        result = await read_job(client, "a")
    assert not result.of("resumed")[0].exact
    assert result.kinds == ["started", "resumed", "token", "end"]


@pytest.mark.parametrize(("first", "second"), [("a", "b"), ("a", ""), ("", "a"), ("", "")])
async def test_workers_without_equal_numerics_ids_continue_with_exact_false(fake, first, second):
    client, shared = fake.client(), SharedModel.echo()
    await client.submit(job_id="a", prompt="abc", max_tokens=9)
    await crashed_attempt(
        fake, shared.fresh(numerics_id=first), reference_tokens(shared, prompt="abc", max_tokens=9)[:4]
    )
    async with serving(fake, shared.fresh(numerics_id=second)):
        result = await read_job(client, "a")
    assert result.of("started")[0].numerics == first
    assert not result.of("resumed")[0].exact
    assert result.text == "abcabcabc"


@pytest.mark.parametrize(("second", "expected"), [(True, True), (False, False)])
def test_a_third_attempt_is_exact_only_if_the_second_one_was(second, expected):
    """The third worker equals the first; tokens of an inexact second one stay in the answer."""
    model, trace = SharedModel.echo().fresh(numerics_id="a"), Trace.of("a", "1-1")
    job = PreparedJob.of(Job.parse({"job_id": "a", "prompt": "abc"}), model, "1-1", 0)
    events = [job.opening(model, History(), 0, 0), Resumed(from_i=0, reason="crash", exact=second)]
    encoded = [encode_event(event, trace.envelope("a", epoch, "w")) for epoch, event in enumerate(events, 1)]
    records = [(f"{i}-0", {"type": each.kind.encode(), "p": each.packed}) for i, each in enumerate(encoded, 1)]
    history = History.read(records, 3, "crash")
    assert job.opening(model, history, 0, 0).exact is expected


async def test_parameters_resolved_by_the_first_attempt_hold_for_later_ones(fake):
    """The second worker's longer context would leave more tokens, but the answer has started."""
    client, small, large = fake.client(), SharedModel.echo(64), SharedModel.echo(128)
    await client.submit(job_id="a", prompt="abc")
    await crashed_attempt(fake, small.fresh(), reference_tokens(small, prompt="abc")[:-3])
    async with serving(fake, large.fresh()):
        result = await read_job(client, "a")
    assert result.of("started")[0].max_tokens == 61 == result.last.tokens_out


async def test_an_answer_that_exceeds_the_context_of_the_next_worker_is_refused(fake):
    client, large, small = fake.client(), SharedModel.echo(4096), SharedModel.echo(64)
    await client.submit(job_id="a", prompt="abc", max_tokens=1000)
    await crashed_attempt(fake, large.fresh(), [])
    async with serving(fake, small.fresh()):
        result = await read_job(client, "a")
    assert result.last.code == "INVALID_REQUEST"
    assert result.kinds == ["started", "error"]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "abc", "max_tokens": 100},
        {"prompt": "abc", "max_tokens": 1000, "stop": ["cab"]},
        {"prompt": "abc" * 40, "max_tokens": 5},
    ],
    ids=["length", "stop string", "long prompt"],
)
async def test_a_complete_answer_is_ended_by_a_worker_with_a_smaller_context(harness, fields):
    client, large, small = harness.client(), SharedModel.echo(4096), SharedModel.echo(64)
    await client.submit(job_id="a", **fields)
    whole = reference_tokens(large, **fields)
    await crashed_attempt(harness, large.fresh(), whole)
    async with serving(harness, small.fresh()):
        result = await read_job(client, "a")
        assert result.kinds == ["started", "token", "resumed", "end"], result.last
        assert (result.last.tokens_out, result.last.finish_reason) == (
            len(whole),
            "stop_sequence" if "stop" in fields else "length",
        )
        assert_none(await find_violations(harness.connect(), "default", {"a": result.text}))


@pytest.mark.parametrize(
    "fields",
    [{"prompt": "abc", "max_tokens": 100}, {"prompt": "abc" * 40, "max_tokens": 5}],
    ids=["long answer", "long prompt"],
)
async def test_an_answer_that_exceeds_this_worker_s_context_is_left_to_a_larger_worker(harness, fields):
    client, large, small = harness.client(), SharedModel.echo(4096), SharedModel.echo(64)
    await client.submit(job_id="a", **fields)
    whole = reference_tokens(large, **fields)
    await crashed_attempt(harness, large.fresh(), whole[:3])
    status = {"state": "busy", "queue": "default", "model": "echo", "context": "4096"}
    await harness.connect().put_status("large", status, 15_000)
    async with serving(harness, small.fresh(), lease=LONG_LEASE) as worker:
        await worker.wait_until_logged("job_released")
        assert worker.logged("job_released")[0]["outcome"] == "other_worker"
        (entry,) = await client.queue()
        assert (await run_job(client, prompt="abc", max_tokens=3)).text == "abc", "it does not hold up other jobs"
        async with serving(harness, large.fresh(), name="w2", lease=LONG_LEASE):
            result = await read_job(client, "a")
        assert result.ids == [token.id for token in whole]
        assert entry.deliveries <= 2, "giving it back counts as no delivery"


async def test_an_answer_is_passed_on_while_the_registry_has_another_type(fake):
    client, large, small = fake.client(), SharedModel.echo(4096), SharedModel.echo(64)
    await client.submit(job_id="a", prompt="abc", max_tokens=100)
    whole = reference_tokens(large, prompt="abc", max_tokens=100)
    await crashed_attempt(fake, large.fresh(), whole[:3])
    await fake.raw.set(WORKERS, "x")
    async with serving(fake, small.fresh(), lease=LONG_LEASE) as worker:
        await worker.wait_until_logged("job_released")
        assert (worker.logged("job_released")[0]["outcome"], await client.dead_letters()) == ("other_worker", [])
        await fake.raw.delete(WORKERS)
        async with serving(fake, large.fresh(), name="w2", lease=LONG_LEASE):
            assert (await read_job(client, "a")).ids == [token.id for token in whole]


async def test_an_answer_that_only_a_dead_worker_could_continue_is_refused(fake):
    client, large, small = fake.client(), SharedModel.echo(4096), SharedModel.echo(64)
    await client.submit(job_id="a", prompt="abc", max_tokens=1000)
    await crashed_attempt(fake, large.fresh(), [])
    for n, change in enumerate(
        ({"state": "failed"}, {"context": "1002"}, {"context": "²"}, {"queue": "other"}, {"model": "other"})
    ):
        status = {"state": "ready", "queue": "default", "model": "echo", "context": "4096", **change}
        await fake.connect().put_status(f"other{n}", status, 15_000)
    async with serving(fake, small.fresh()):
        assert (await read_job(client, "a")).last.code == "INVALID_REQUEST"


async def test_an_answer_with_ids_of_another_vocabulary_is_refused(fake, model):
    client = fake.client()
    await client.submit(job_id="a", prompt_tokens=[300, 301], max_tokens=20, ignore_eos=True)
    whole = reference_tokens(model("phi3"), prompt_tokens=[300, 301], max_tokens=20, ignore_eos=True, temperature=0)
    large = [token for token in whole if token.id >= 300] or whole
    await crashed_attempt(fake, model("phi3").fresh(), [type(t)(i, 400, t.t) for i, t in enumerate(large[:2])])
    async with serving(fake, model().fresh()):
        result = await read_job(client, "a")
    assert result.last.code == "INVALID_REQUEST"


async def test_a_drain_with_a_short_grace_period_hands_the_job_over_at_once(harness):
    client, model = harness.client(), SharedModel.echo()
    slow = ScriptedRunner(model.runner, lambda step: time.sleep(0.01))
    lease = LeaseSection(lease_s=8, renew_s=1, scan_s=0.05)
    async with serving(harness, model.fresh(slow), name="w1", grace_s=0.2, lease=lease) as one:
        await client.submit(job_id="a", prompt="abc", max_tokens=300)
        await wait_until(lambda: _longer_than(harness, "a", 5))
        async with serving(harness, SharedModel.echo().fresh(), name="w2", lease=lease):
            one.service.signal("test")
            assert await asyncio.wait_for(one.task, 5) == 0
            began = time.monotonic()
            result = await read_job(client, "a")
            assert time.monotonic() - began < 3, "the job waited for its lease to expire"
    assert result.text == "abc" * 100
    assert [(r.reason, r.exact) for r in result.of("resumed")] == [("drain", True)]
    assert one.logged("job_released")[0]["outcome"] == "handed_back"


async def _longer_than(harness, job_id, count):
    return len((await published_events(harness, job_id)).ids) > count


async def test_a_drain_finishes_the_running_job_and_takes_no_other(harness):
    client, model = harness.client(), SharedModel.echo()
    slow = ScriptedRunner(model.runner, lambda step: time.sleep(0.01))
    async with serving(harness, model.fresh(slow), name="w1") as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=60)
        await client.submit(job_id="b", prompt="abc", max_tokens=60)
        await wait_until(lambda: _longer_than(harness, "a", 5))
        assert await worker.stop() == 0
    assert (await published_events(harness, "a")).kinds == ["started", "token", "end"]
    assert (await published_events(harness, "b")).items == []
    assert [entry.job_id for entry in await client.queue()] == ["b"]


async def test_handing_a_job_over_is_no_failed_attempt(fake):
    client, model = fake.client(), SharedModel.echo()
    slow = ScriptedRunner(model.runner, lambda step: time.sleep(0.02))
    await client.submit(job_id="a", prompt="abc", max_tokens=100)
    for n in range(5):
        async with serving(fake, model.fresh(slow), name=f"w{n}", grace_s=0.0) as worker:

            async def holds_it(name=f"w{n}"):
                state = await client.state("a")
                return (state.get("worker"), state.get("state")) == (name, "running")

            await wait_until(holds_it)
            await worker.stop()
    async with serving(fake, SharedModel.echo().fresh(), name="last"):
        result = await read_job(client, "a")
    assert result.text == "abc" * 33 + "a"
    assert {r.reason for r in result.of("resumed")} == {"drain"}


async def test_a_worker_that_lost_its_entry_drops_the_job_and_serves_the_next(harness):
    """As after a suspension: by its next write another worker has begun an epoch."""
    client, barrier, model = harness.client(), StepBarrier(at=5), SharedModel.echo()
    rare_renewals = LeaseSection(lease_s=60, renew_s=30, scan_s=0.05)
    async with serving(
        harness, model.fresh(ScriptedRunner(model.runner, barrier.script)), name="w1", lease=rare_renewals
    ) as one:
        await client.submit(job_id="a", prompt="abc", max_tokens=30)
        await barrier.wait_until_reached()
        entry = (await client.queue())[0]
        await harness.connect().give_back("default", "w1", entry.entry_id, 60_000, 1)
        async with serving(harness, SharedModel.echo().fresh(), name="w2"):
            result = await read_job(client, "a")
        barrier.release()
        await wait_until(lambda: _dropped(one))
        assert [(i.entry_id, i.event) for i in (await published_events(harness, "a")).items] == [
            (i.entry_id, i.event) for i in result.items
        ]
        assert result.text == "abc" * 10
        assert one.engine.idle
        assert one.logged("job_released")[0]["outcome"] == "fenced"
        await client.submit(job_id="b", prompt="abc", max_tokens=3)
        assert (await read_job(client, "b")).text == "abc"
    assert_none(await find_violations(harness.connect(), "default", {"a": "abc" * 10, "b": "abc"}))


async def test_a_renewal_that_finds_another_owner_stops_the_attempt_at_once(harness):
    client, model = harness.client(), SharedModel.echo()
    slow = ScriptedRunner(model.runner, lambda step: time.sleep(0.02))
    async with serving(harness, model.fresh(slow), name="w1") as one:
        await client.submit(job_id="a", prompt="abc", max_tokens=1000)
        await wait_until(lambda: _longer_than(harness, "a", 3))
        thief = harness.connect()

        async def stolen():  # unless it is renewed between the two calls
            return await thief.reclaim("default", "thief", (await thief.pending("default", 1))[0])

        await wait_until(stolen)
        await wait_until(lambda: _dropped(one))
        assert one.logged("job_released")[0]["outcome"] == "lost"
        assert one.engine.idle
        assert (await published_events(harness, "a")).kinds == ["started", "token"]
        assert [held.worker for held in await client.queue()] == ["thief"], "it was not acknowledged"


@pytest.mark.parametrize("destroy", [False, True], ids=["entry", "queue"])
async def test_a_running_job_whose_queue_entry_is_deleted_ends_with_an_error(harness, destroy):
    client, model = harness.client(), SharedModel.echo()
    slow = ScriptedRunner(model.runner, lambda step: time.sleep(0.02))
    async with serving(harness, model.fresh(slow), lease=LONG_LEASE) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=1000)
        await wait_until(lambda: _longer_than(harness, "a", 3))
        if destroy:
            await harness.drop(queue_key("default"))
        else:
            await harness.connect().delete(queue_key("default"), (await client.queue())[0].entry_id)
        result = await read_job(client, "a")
        assert result.kinds == ["started", "token", "error"]
        assert (result.last.code, result.last.message) == ("CANCELLED", "the job's queue entry was deleted")
        assert (await client.state("a"))["state"] == "error"
        assert worker.engine.idle
        assert (await run_job(client, prompt="abc", max_tokens=3)).text == "abc"
        assert_none(await find_violations(harness.connect(), "default", {"a": None}))


async def _dropped(worker):
    return bool(worker.logged("job_released"))


async def test_replayed_steps_count_for_the_watchdog_and_not_for_the_timeout(fake):
    client, model = fake.client(), SharedModel.echo()
    loaded = model.fresh(ScriptedRunner(model.runner, lambda step: time.sleep(0.02)))
    whole = reference_tokens(model, prompt="abc", max_tokens=60)
    await client.submit(job_id="a", prompt="abc", max_tokens=60)
    await crashed_attempt(fake, model.fresh(), whole[:50])
    async with serving(fake, loaded, inference_timeout_s=0.6, stall_s=0.6):
        result = await read_job(client, "a")
    assert result.kinds[-1] == "end", "50 replayed tokens take a second, the ten others 0.2 s"
    assert isinstance(result.of("resumed")[0], Resumed)


async def test_a_job_whose_keys_are_gone_is_dropped(fake):
    client, barrier, model = fake.client(), StepBarrier(at=5), SharedModel.echo()
    async with serving(fake, model.fresh(ScriptedRunner(model.runner, barrier.script)), lease=SHORT_LEASE) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=30)
        await barrier.wait_until_reached()
        await wait_until(lambda: _longer_than(fake, "a", 1))
        for key in ("events", "state"):
            await fake.drop(f"inf:{{job:a}}:{key}")
        barrier.release()
        await wait_until(lambda: _dropped(worker))
        assert worker.logged("job_released")[0]["outcome"] == "fenced"
        assert "inf:{job:a}:events" not in await fake.keys()
