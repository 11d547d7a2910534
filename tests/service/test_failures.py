"""Jobs that end in an error: every code without a GPU, cancels, deadlines, engine faults."""

from __future__ import annotations

import asyncio
import time

import msgpack
import pytest

from tests.jobs.harness import LossyStreams, wait_until
from tests.jobs.stream_checker import assert_none, find_violations, keys_without_ttl
from tests.models import free_kv_blocks
from tests.service.models import FixedDevice, ScriptedRunner, SharedModel, StepBarrier, failing_model, slow_model
from tests.service.serving import (
    LONG_LEASE,
    SHORT_LEASE,
    published_events,
    read_job,
    run_job,
    serving,
    wait_until_queue_is_empty,
    worker_events,
)
from worker.backend import MemoryUse
from worker.config import LeaseSection
from worker.errors import CudaError, Internal, VramOom
from worker.jobs.events import ErrorEvent


async def wait_until_running(client, job_id):
    async def running():
        return (await client.state(job_id)).get("state") == "running"

    await wait_until(running)


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"prompt": "x", "max_tokens": 10_000}, "max_tokens"),
        ({"prompt": "x" * 5000}, "prompt"),
        ({"prompt": "", "max_tokens": 5}, "prompt"),
        ({"prompt": "x", "model": "another"}, "model"),
        ({"prompt_tokens": [1, 99_999]}, "prompt_tokens.1"),
        ({"prompt": "x", "top_k": 5_000}, "top_k"),
        ({"prompt": "x", "logit_bias": {5_000: 1.0}}, "logit_bias.5000"),
    ],
)
async def test_a_job_that_the_model_cannot_serve_is_refused_with_the_wrong_field(fake, fields, wrong):
    client = fake.client()
    async with serving(fake, SharedModel.echo().fresh()):
        result = await run_job(client, job_id="a", **fields)
        assert result.kinds == ["error"]
        assert (result.last.code, result.last.retriable) == ("INVALID_REQUEST", False)
        assert [error["field"] for error in result.last.details["errors"]] == [wrong]
        assert result.items[0].entry_id == "1-0"
        await wait_until_queue_is_empty(client)


async def test_a_prompt_at_which_a_native_library_panics_fails_that_job_only(fake, model):
    client = fake.client()
    async with serving(fake, model("gpt-oss").fresh(), max_payload_bytes=2**24):
        payload = msgpack.packb({"job_id": "a", "prompt": "A" * 11_000_000})
        await fake.connect().enqueue("default", {"p": payload}, 100)
        result = await read_job(client, "a")
        assert (result.kinds, result.last.code) == (["error"], "INVALID_REQUEST")
        assert "words of millions of characters" in result.last.message
        assert (await run_job(client, prompt="A", max_tokens=2, ignore_eos=True)).last.finish_reason == "length"
        await wait_until_queue_is_empty(client)


async def test_every_wrong_field_of_a_payload_is_named(harness):
    client = harness.client()
    payload = {"job_id": "a", "prompt": "x", "temperature": 3, "top_p": -1, "tempo": 1, "stop": [""], "v": 3}
    async with serving(harness, SharedModel.echo().fresh()):
        await harness.connect().enqueue("default", {"p": msgpack.packb(payload)}, 100)
        result = await read_job(client, "a")
        assert {e["field"] for e in result.last.details["errors"]} == {"temperature", "top_p", "tempo", "stop.0", "v"}
        await wait_until_queue_is_empty(client)


async def test_an_oversize_payload_is_refused_without_decoding(fake):
    client = fake.client()
    async with serving(fake, SharedModel.echo().fresh(), max_payload_bytes=2048):
        payload = msgpack.packb({"job_id": "a", "prompt": "x" * 4096})
        await fake.connect().enqueue("default", {"p": payload}, 100)
        result = await read_job(client, "a")
        assert result.last.code == "INVALID_REQUEST"
        assert result.last.details["errors"][0]["constraint"] == "at most 2048 bytes"
        result = await run_job(client, prompt="abc", max_tokens=3)
        assert result.text == "abc"


async def test_a_payload_without_a_job_id_becomes_a_dead_letter(harness):
    client = harness.client()
    async with serving(harness, SharedModel.echo().fresh(), name="w1") as worker:
        await harness.connect().enqueue("default", {"p": b"\xc1 no job"}, 100)
        await wait_until(lambda: _has(client.dead_letters()))
        letter = (await client.dead_letters())[0]
        assert (letter.job_id, letter.payload) == ("", b"\xc1 no job")
        assert (await run_job(client, prompt="abc", max_tokens=3)).text == "abc"
        assert "INVALID_REQUEST" in [
            e.code for e in await worker_events(harness, worker.name) if isinstance(e, ErrorEvent)
        ]


async def _has(listing):
    return bool(await listing)


async def test_a_running_job_is_cancelled_within_a_step_and_its_memory_is_released(harness):
    client, loaded = harness.client(), slow_model(0.02)
    async with serving(harness, loaded) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=1000)
        await wait_until_running(client, "a")
        began = time.monotonic()
        assert await client.cancel("a") == "requested"
        result = await read_job(client, "a")
        assert time.monotonic() - began < 1.0
        assert result.last.code == "CANCELLED"
        assert not result.last.retriable
        assert worker.engine.idle
        assert free_kv_blocks(worker.engine) == free_kv_blocks(loaded.engine)
        assert await client.cancel("a") == "cancelled"
        assert (await run_job(client, prompt="abc", max_tokens=3)).text == "abc"
        assert_none(await find_violations(harness.connect(), "default", {"a": None}))


async def test_a_cancel_whose_command_was_lost_is_seen_at_the_next_renewal(fake):
    client = fake.client()
    async with serving(fake, slow_model(0.02)):
        await client.submit(job_id="a", prompt="abc", max_tokens=1000)
        await wait_until_running(client, "a")
        await fake.raw.hset("inf:{job:a}:state", "cancel", "1")
        assert (await read_job(client, "a")).last.code == "CANCELLED"


async def test_a_long_prefill_is_cancelled_between_its_chunks(fake):
    client, barrier, model = fake.client(), StepBarrier(at=2), SharedModel.echo()
    runner = ScriptedRunner(model.runner, barrier.script)
    async with serving(fake, model.fresh(runner)):
        await client.submit(job_id="a", prompt="x" * 2000, max_tokens=5)
        await barrier.wait_until_reached()
        await wait_until_running(client, "a")
        assert await client.cancel("a") == "requested"

        async def received():
            return bool(await fake.raw.xlen("inf:control"))

        await wait_until(received)
        await asyncio.sleep(0.1)  # the worker receives the command while the step runs
        barrier.release()
        result = await read_job(client, "a")
    assert result.last.code == "CANCELLED"
    assert runner.steps <= 4, "the prefill of 32 chunks continued after the cancel"


async def test_a_waiting_job_is_cancelled_at_once_and_never_runs(harness):
    client, barrier, model = harness.client(), StepBarrier(at=1), SharedModel.echo()
    async with serving(harness, model.fresh(ScriptedRunner(model.runner, barrier.script))):
        await client.submit(job_id="first", prompt="abc", max_tokens=5)
        await barrier.wait_until_reached()
        await client.submit(job_id="a", prompt="abc", max_tokens=5)
        assert await client.cancel("a") == "cancelled"
        assert (await read_job(client, "a")).last.code == "CANCELLED"
        barrier.release()
        await wait_until_queue_is_empty(client)
        assert (await published_events(harness, "a")).kinds == ["error"]
        assert await client.cancel("a") == "cancelled"
        assert await client.cancel("first") == "over"
        assert await client.cancel("unknown") == "unknown"


async def test_a_deadline_that_passed_while_the_job_waited(harness):
    client, barrier, model = harness.client(), StepBarrier(at=1), SharedModel.echo()
    async with serving(harness, model.fresh(ScriptedRunner(model.runner, barrier.script))):
        await client.submit(job_id="first", prompt="abc", max_tokens=5)
        await barrier.wait_until_reached()
        await client.submit(job_id="a", prompt="abc", max_tokens=5, deadline_ms=50)
        await asyncio.sleep(0.1)
        barrier.release()
        result = await read_job(client, "a")
    assert result.kinds == ["error"]
    assert (result.last.code, result.last.retriable) == ("INFERENCE_TIMEOUT", False)


async def test_a_deadline_ends_a_running_job_in_time(harness):
    client = harness.client()
    async with serving(harness, slow_model(0.01)) as worker:
        began = time.monotonic()
        result = await run_job(client, prompt="abc", max_tokens=4000, deadline_ms=400)
        assert 0.3 < time.monotonic() - began < 1.5
        assert result.kinds == ["started", "token", "error"]
        assert result.last.code == "INFERENCE_TIMEOUT"
        assert worker.engine.idle


async def test_a_deadline_passes_while_a_long_prompt_is_tokenized(fake):
    model = SharedModel.echo()

    class SlowTokenizer:
        def __init__(self, tokenizer):
            self._tokenizer = tokenizer

        def __getattr__(self, name):
            return getattr(self._tokenizer, name)

        def encode_prompt(self, text, *, special=True):
            time.sleep(0.5)
            return self._tokenizer.encode_prompt(text, special=special)

    client = fake.client()
    async with serving(fake, model.fresh(tokenizer=SlowTokenizer(model.loaded.tokenizer))):
        began = time.monotonic()
        result = await run_job(client, prompt="abc" * 2000, max_tokens=5, deadline_ms=100)
        assert time.monotonic() - began < 0.45
        assert (result.kinds, result.last.code) == (["error"], "INFERENCE_TIMEOUT")


async def test_the_inference_timeout_ends_an_attempt(fake):
    client = fake.client()
    async with serving(fake, slow_model(0.01), inference_timeout_s=0.3):
        result = await run_job(client, prompt="abc", max_tokens=4000)
        assert result.last.code == "INFERENCE_TIMEOUT"
        assert 5 < len(result.tokens) < 40
        assert (await run_job(client, prompt="abc", max_tokens=3)).text == "abc"


@pytest.mark.parametrize("error", [VramOom("the pool is full"), MemoryError("no more")])
async def test_a_failed_allocation_fails_only_its_job(fake, error):
    client, loaded = fake.client(), failing_model(error, at=3)
    async with serving(fake, loaded) as worker:
        baseline = await wait_for_vram(fake, worker)
        result = await run_job(client, prompt="abc", max_tokens=10)
        assert result.kinds == ["started", "token", "error"]
        assert (result.last.code, result.last.retriable) == ("VRAM_OOM", True)
        await wait_until(lambda: _async(worker.service._health.degraded))
        assert free_kv_blocks(worker.engine) == free_kv_blocks(loaded.engine)
        assert (await run_job(client, prompt="abc", max_tokens=10)).text == "abcabcabca"
        await wait_until(lambda: _async(not worker.service._health.degraded))
        assert (await wait_for_vram(fake, worker)) == baseline


async def _async(value):
    return value


async def wait_for_vram(harness, worker):
    async def seen():
        return any(event.kind == "vram" for event in await worker_events(harness, worker.name))

    await wait_until(seen)
    newest = [event for event in await worker_events(harness, worker.name) if event.kind == "vram"][-1]
    return newest.weights, newest.kv, newest.activations


async def test_another_fault_is_internal_and_its_trace_is_only_in_the_log(fake):
    client = fake.client()
    async with serving(fake, failing_model(ZeroDivisionError("the secret of step 2"), at=2)) as worker:
        result = await run_job(client, job_id="a", prompt="abc", max_tokens=10)
        assert (result.last.code, result.last.retriable) == ("INTERNAL", True)
        assert "secret" not in str(result.last.to_fields())
        assert "ZeroDivisionError" in result.last.message
        fault = worker.logged("engine_fault")[0]
        assert "the secret of step 2" in fault["trace"]
        assert fault["job_id"] == "a"
        assert (await run_job(client, prompt="abc", max_tokens=3)).text == "abc"


async def test_an_error_of_the_engine_keeps_its_message(fake):
    client = fake.client()
    async with serving(fake, failing_model(Internal("the logits are not finite"), at=2)):
        result = await run_job(client, prompt="abc", max_tokens=10)
        assert (result.last.code, result.last.message) == ("INTERNAL", "the logits are not finite")


async def test_a_lost_device_ends_the_worker_and_another_continues_the_job(harness):
    client = harness.client()
    loaded = failing_model(CudaError("an illegal address"), at=5, times=100)
    async with serving(harness, loaded, name="w1") as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=10)
        assert await asyncio.wait_for(worker.task, 10) == 2
    codes = [event.code for event in await worker_events(harness, "w1") if isinstance(event, ErrorEvent)]
    assert codes == ["CUDA_ERROR"]
    result = await published_events(harness, "a")
    assert result.kinds == ["started", "token"]
    began = time.monotonic()
    async with serving(harness, SharedModel.echo().fresh(), name="w2"):
        result = await read_job(client, "a")
    assert time.monotonic() - began < 4
    assert result.kinds == ["started", "token", "resumed", "token", "end"]
    assert result.text == "abcabcabca"
    assert result.of("resumed")[0].reason == "crash"
    stopped = (await worker_events(harness, "w1"))[-1]
    assert (stopped.kind, stopped.exit_code) == ("stopped", 2)


async def test_an_engine_that_hangs_ends_the_worker_and_another_continues(harness):
    client, barrier, model = harness.client(), StepBarrier(at=4), SharedModel.echo()
    loaded = model.fresh(ScriptedRunner(model.runner, barrier.script))
    async with serving(harness, loaded, name="w1", stall_s=0.5) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=10)
        assert await asyncio.wait_for(worker.task, 10) == 2
        async with serving(harness, SharedModel.echo().fresh(), name="w2"):
            result = await read_job(client, "a")
        barrier.release()
    assert result.text == "abcabcabca"
    assert result.of("resumed")[0].from_i == len(
        [i for i in result.items if i.kind == "token" and i.envelope.epoch == 1]
    )


async def test_a_cancel_cannot_hang_a_worker_whose_engine_hangs(fake):
    client, barrier, model = fake.client(), StepBarrier(at=4), SharedModel.echo()
    async with serving(fake, model.fresh(ScriptedRunner(model.runner, barrier.script)), stall_s=0.5) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=10)
        await barrier.wait_until_reached()
        await client.cancel("a")
        assert await asyncio.wait_for(worker.task, 10) == 2
        barrier.release()


async def test_a_job_is_dead_lettered_after_three_attempts_without_a_new_token(harness):
    client = harness.client()
    await client.submit(job_id="poison", prompt="abc", max_tokens=10)
    for n in range(3):
        async with serving(harness, failing_model(CudaError("again"), at=0, times=100), name=f"w{n}") as worker:
            assert await asyncio.wait_for(worker.task, 10) == 2
    async with serving(harness, SharedModel.echo().fresh(), name="last"):
        result = await read_job(client, "poison")
        assert (result.last.code, result.last.retriable) == ("DEAD_LETTERED", False)
        assert result.kinds == ["started", "resumed", "resumed", "error"]
        await wait_until_queue_is_empty(client)
        letter = (await client.dead_letters())[0]
        assert (letter.job_id, letter.attempts, letter.last_error) == ("poison", 3, "CUDA_ERROR")
        again = await client.retry_dead_letter(letter)
        assert (await read_job(client, again)).text == "abcabcabca"


async def test_a_job_that_progresses_is_never_dead_lettered(fake):
    client = fake.client()
    await client.submit(job_id="a", prompt="abc", max_tokens=10)
    for n in range(4):
        async with serving(fake, failing_model(CudaError("again"), at=2 + 2 * n, times=100), name=f"w{n}") as worker:
            assert await asyncio.wait_for(worker.task, 10) == 2
    async with serving(fake, SharedModel.echo().fresh(), name="last"):
        assert (await read_job(client, "a")).text == "abcabcabca"


async def test_a_fault_while_tokenizing_is_internal_and_does_not_reveal_the_prompt(fake):
    model = SharedModel.echo()

    class BrokenTokenizer:
        vocab = model.loaded.tokenizer.vocab

        def prepare(self):
            pass

        def encode_prompt(self, text, *, special=True):
            raise RuntimeError(f"cannot encode {text}")

    client = fake.client()
    async with serving(fake, model.fresh(tokenizer=BrokenTokenizer())) as worker:
        result = await run_job(client, prompt="my private text", max_tokens=5)
        assert (result.kinds, result.last.code) == (["error"], "INTERNAL")
        assert "private" not in result.last.message
        assert "private" not in worker.output.getvalue()
        assert any("encode_prompt" in frame for frame in worker.logged("job_fault")[0]["frames"])


@pytest.mark.parametrize("key", ["events", "state"])
async def test_a_job_whose_key_holds_another_type_is_dead_lettered_with_the_reason(fake, key):
    client = fake.client()
    await fake.raw.set(f"inf:{{job:a}}:{key}", "neither a stream nor a hash")
    async with serving(fake, SharedModel.echo().fresh()) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=5)
        await worker.wait_until_logged("job_failed")
        assert (await run_job(client, prompt="abc", max_tokens=3)).text == "abc"
        await wait_until_queue_is_empty(client)
    (letter,) = await client.dead_letters()
    assert (letter.job_id, letter.last_error) == ("a", "REDIS_REFUSED")
    assert "WRONGTYPE" in letter.reason
    assert_none(keys_without_ttl(await fake.keys()))


async def test_a_dead_letter_waits_while_the_dead_letters_have_another_type(fake):
    client, key = fake.client(), "inf:{q:default}:dead"
    await fake.raw.set(key, "not a stream")
    async with serving(fake, SharedModel.echo().fresh(), lease=SHORT_LEASE) as worker:
        await fake.connect().enqueue("default", {"p": b"no payload"}, 10)
        await worker.wait_until_logged("redis_refused")
        for _ in range(3):
            assert (await run_job(client, prompt="abc", max_tokens=3)).text == "abc"
            await asyncio.sleep(1.2 * SHORT_LEASE.lease_s)
        reasons = [line["reason"] for line in worker.logged("redis_refused")]
        assert all(key in reason for reason in reasons)
        assert len(reasons) == len(set(reasons)), "each is logged once"
        assert not worker.logged("job_failed")
        await fake.raw.delete(key)
        await wait_until_queue_is_empty(client)
    assert len(await client.dead_letters()) == 1


async def test_memory_is_reported_as_the_device_measures_it(fake):
    model, client = SharedModel.echo(), fake.client()
    use = MemoryUse(weights=500, kv=40, activations=3, runtime=2, free=1000)
    async with serving(fake, model.fresh(device=FixedDevice(use)), metrics_ms=250) as worker:
        assert await wait_for_vram(fake, worker) == (500, 40, 3)
        slowly = ScriptedRunner(model.runner, lambda step: time.sleep(0.02))
        worker.engine._runner = slowly
        result = await run_job(client, prompt="abc", max_tokens=40)
        assert {(m.vram_used, m.vram_free) for m in result.of("metrics")} == {(545, 1000)}


def faulty(harness, call, times):
    """A connection on which the first calls of that name raise an error that no code expects."""
    left = [times]

    async def before(name):
        if name == call and left[0] > 0:
            left[0] -= 1
            raise RuntimeError("a bug")

    return LossyStreams(harness.connect(), lambda name: False, before)


async def test_an_entry_is_claimable_at_once_after_a_fault_of_the_attempt(harness):
    client, streams = harness.client(), faulty(harness, "take", 1)
    async with serving(harness, SharedModel.echo().fresh(), lease=LONG_LEASE, streams=streams) as one:
        await client.submit(job_id="a", prompt="abc", max_tokens=6)
        await one.wait_until_logged("attempt_fault")
        async with serving(harness, SharedModel.echo().fresh(), name="w2", lease=LONG_LEASE):
            assert (await read_job(client, "a")).text == "abcabc"
        assert (await run_job(client, prompt="abc", max_tokens=3)).text == "abc"
    assert_none(await find_violations(harness.connect(), "default", {"a": "abcabc"}))


@pytest.mark.parametrize("call", ["take", "renew"])
async def test_a_worker_alone_tries_again_a_lease_after_a_fault(harness, call):
    client = harness.client()
    async with serving(harness, slow_model(0.02), streams=faulty(harness, call, 2)) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=30)
        assert (await read_job(client, "a")).text == "abc" * 10

        async def nothing_held():  # the acknowledgement follows the last event
            return worker.transport._consumers["default"]._held == {}

        await wait_until(nothing_held)
    assert_none(await find_violations(harness.connect(), "default", {"a": "abc" * 10}))


async def test_a_job_of_which_every_attempt_faults_is_dead_lettered(harness):
    client, lease = harness.client(), LeaseSection(lease_s=0.1, renew_s=0.05, scan_s=0.02, max_deliveries=3)
    async with serving(harness, SharedModel.echo().fresh(), lease=lease, streams=faulty(harness, "take", 3)) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=6)
        result = await read_job(client, "a")
        assert result.last.code == "DEAD_LETTERED"
        assert len(worker.logged("attempt_fault")) == 3
    assert [letter.job_id for letter in await client.dead_letters()] == ["a"]
