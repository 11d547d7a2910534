"""How jobs end that do not end well: every error code that needs no GPU, cancels, deadlines, faults of the engine."""

from __future__ import annotations

import asyncio
import time

import msgpack
import pytest

from tests.jobs.harness import wait_until
from tests.jobs.stream_checker import assert_none, find_violations
from tests.service.serving import (
    QUICK,
    FixedDevice,
    Gate,
    Model,
    Scripted,
    ask,
    own_events,
    published,
    serving,
    story,
)
from worker.backend import MemoryUse
from worker.config import LeaseSection
from worker.errors import CudaError, Internal, VramOom
from worker.jobs.events import ErrorEvent


def slow(seconds, model=None):
    """An echo whose every step takes so long."""
    model = model or Model.echo()
    return model.fresh(Scripted(model.runner, lambda step: time.sleep(seconds)))


def failing(error, at, times=1):
    """An echo whose steps from `at` on raise `error`, so many of them."""
    model = Model.echo()

    def script(step):
        if at <= step < at + times:
            raise error

    return model.fresh(Scripted(model.runner, script))


async def is_running(client, job_id):
    async def running():
        return (await client.state(job_id)).get("state") == "running"

    await wait_until(running)


async def gone(client):
    async def empty():
        return not await client.queue()

    await wait_until(empty)


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
async def test_what_the_model_cannot_do_is_refused_by_name(fake, fields, wrong):
    client = fake.client()
    async with serving(fake, Model.echo().fresh()):
        told = await ask(client, job_id="a", **fields)
        assert told.kinds == ["error"]
        assert (told.last.code, told.last.retriable) == ("INVALID_REQUEST", False)
        assert [error["field"] for error in told.last.details["errors"]] == [wrong]
        assert told.items[0].entry_id == "1-0"
        await gone(client)


async def test_every_wrong_field_of_a_payload_is_named(harness):
    client = harness.client()
    payload = {"job_id": "a", "prompt": "x", "temperature": 3, "top_p": -1, "tempo": 1, "stop": [""], "v": 2}
    async with serving(harness, Model.echo().fresh()):
        await harness.connect().enqueue("default", {"p": msgpack.packb(payload)}, 100)
        told = await story(client, "a")
        assert {e["field"] for e in told.last.details["errors"]} == {"temperature", "top_p", "tempo", "stop.0", "v"}
        await gone(client)


async def test_an_oversize_payload_is_refused_unread(fake):
    client = fake.client()
    async with serving(fake, Model.echo().fresh(), max_payload_bytes=2048):
        payload = msgpack.packb({"job_id": "a", "prompt": "x" * 4096})
        await fake.connect().enqueue("default", {"p": payload}, 100)
        told = await story(client, "a")
        assert told.last.code == "INVALID_REQUEST"
        assert told.last.details["errors"][0]["constraint"] == "at most 2048 bytes"
        told = await ask(client, prompt="abc", max_tokens=3)
        assert told.text == "abc"


async def test_a_payload_without_a_job_id_becomes_a_dead_letter(harness):
    client = harness.client()
    async with serving(harness, Model.echo().fresh(), name="w1") as worker:
        await harness.connect().enqueue("default", {"p": b"\xc1 no job"}, 100)
        await wait_until(lambda: _has(client.dead_letters()))
        letter = (await client.dead_letters())[0]
        assert (letter.job_id, letter.payload) == ("", b"\xc1 no job")
        assert (await ask(client, prompt="abc", max_tokens=3)).text == "abc"
        assert "INVALID_REQUEST" in [
            e.code for e in await own_events(harness, worker.name) if isinstance(e, ErrorEvent)
        ]


async def _has(listing):
    return bool(await listing)


async def test_a_running_job_is_cancelled_within_a_step_and_its_memory_is_free(harness):
    client, served = harness.client(), slow(0.02)
    async with serving(harness, served) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=1000)
        await is_running(client, "a")
        began = time.monotonic()
        assert await client.cancel("a") == "requested"
        told = await story(client, "a")
        assert time.monotonic() - began < 1.0
        assert told.last.code == "CANCELLED"
        assert not told.last.retriable
        assert worker.engine.idle
        assert worker.engine.free_kv_blocks == served.engine.free_kv_blocks
        assert await client.cancel("a") == "cancelled"
        assert (await ask(client, prompt="abc", max_tokens=3)).text == "abc"
        assert_none(await find_violations(harness.connect(), "default", {"a": None}))


async def test_a_cancel_whose_command_was_lost_is_seen_at_the_next_renewal(fake):
    client = fake.client()
    async with serving(fake, slow(0.02)):
        await client.submit(job_id="a", prompt="abc", max_tokens=1000)
        await is_running(client, "a")
        await fake.raw.hset("inf:{job:a}:state", "cancel", "1")
        assert (await story(client, "a")).last.code == "CANCELLED"


async def test_a_long_prefill_is_cancelled_between_its_chunks(fake):
    client, gate, model = fake.client(), Gate(at=2), Model.echo()
    runner = Scripted(model.runner, gate.script)
    async with serving(fake, model.fresh(runner)):
        await client.submit(job_id="a", prompt="x" * 2000, max_tokens=5)
        await gate.until_reached()
        await is_running(client, "a")
        assert await client.cancel("a") == "requested"

        async def heard():
            return bool(await fake.raw.xlen("inf:control"))

        await wait_until(heard)
        await asyncio.sleep(0.1)  # the worker hears it while the step is still under way
        gate.open()
        told = await story(client, "a")
    assert told.last.code == "CANCELLED"
    assert runner.steps <= 4, "a prompt of 32 chunks went on after the cancel"


async def test_a_waiting_job_is_cancelled_at_once_and_never_runs(harness):
    client, gate, model = harness.client(), Gate(at=1), Model.echo()
    async with serving(harness, model.fresh(Scripted(model.runner, gate.script))):
        await client.submit(job_id="first", prompt="abc", max_tokens=5)
        await gate.until_reached()
        await client.submit(job_id="a", prompt="abc", max_tokens=5)
        assert await client.cancel("a") == "cancelled"
        assert (await story(client, "a")).last.code == "CANCELLED"
        gate.open()
        await gone(client)
        assert (await published(harness, "a")).kinds == ["error"]
        assert await client.cancel("a") == "cancelled"
        assert await client.cancel("first") == "over"
        assert await client.cancel("unheard-of") == "cancelled"


async def test_a_deadline_that_passed_while_the_job_waited(harness):
    client, gate, model = harness.client(), Gate(at=1), Model.echo()
    async with serving(harness, model.fresh(Scripted(model.runner, gate.script))):
        await client.submit(job_id="first", prompt="abc", max_tokens=5)
        await gate.until_reached()
        await client.submit(job_id="a", prompt="abc", max_tokens=5, deadline_ms=50)
        await asyncio.sleep(0.1)
        gate.open()
        told = await story(client, "a")
    assert told.kinds == ["error"]
    assert (told.last.code, told.last.retriable) == ("INFERENCE_TIMEOUT", False)


async def test_a_deadline_ends_a_running_job_in_time(harness):
    client = harness.client()
    async with serving(harness, slow(0.01)) as worker:
        began = time.monotonic()
        told = await ask(client, prompt="abc", max_tokens=4000, deadline_ms=400)
        assert 0.3 < time.monotonic() - began < 1.5
        assert told.kinds == ["started", "token", "error"]
        assert told.last.code == "INFERENCE_TIMEOUT"
        assert worker.engine.idle


async def test_a_deadline_passes_while_a_long_prompt_is_tokenized(fake):
    model = Model.echo()

    class Slow:
        def __init__(self, tokenizer):
            self._tokenizer = tokenizer

        def __getattr__(self, name):
            return getattr(self._tokenizer, name)

        def encode_prompt(self, text, *, special=True):
            time.sleep(0.5)
            return self._tokenizer.encode_prompt(text, special=special)

    client = fake.client()
    async with serving(fake, model.fresh(tokenizer=Slow(model.served.tokenizer))):
        began = time.monotonic()
        told = await ask(client, prompt="abc" * 2000, max_tokens=5, deadline_ms=100)
        assert time.monotonic() - began < 0.45
        assert (told.kinds, told.last.code) == (["error"], "INFERENCE_TIMEOUT")


async def test_the_inference_timeout_ends_an_attempt(fake):
    client = fake.client()
    async with serving(fake, slow(0.01), inference_timeout_s=0.3):
        told = await ask(client, prompt="abc", max_tokens=4000)
        assert told.last.code == "INFERENCE_TIMEOUT"
        assert 5 < len(told.tokens) < 40
        assert (await ask(client, prompt="abc", max_tokens=3)).text == "abc"


@pytest.mark.parametrize("error", [VramOom("the pool is full"), MemoryError("no more")])
async def test_a_failed_allocation_fails_its_job_alone(fake, error):
    client, served = fake.client(), failing(error, at=3)
    async with serving(fake, served) as worker:
        baseline = await wait_for_vram(fake, worker)
        told = await ask(client, prompt="abc", max_tokens=10)
        assert told.kinds == ["started", "token", "error"]
        assert (told.last.code, told.last.retriable) == ("VRAM_OOM", True)
        await wait_until(lambda: _true(worker.service._health.degraded))
        assert worker.engine.free_kv_blocks == served.engine.free_kv_blocks
        assert (await ask(client, prompt="abc", max_tokens=10)).text == "abcabcabca"
        await wait_until(lambda: _true(not worker.service._health.degraded))
        assert (await wait_for_vram(fake, worker)) == baseline


async def _true(value):
    return value


async def wait_for_vram(harness, worker):
    async def seen():
        return any(event.kind == "vram" for event in await own_events(harness, worker.name))

    await wait_until(seen)
    newest = [event for event in await own_events(harness, worker.name) if event.kind == "vram"][-1]
    return newest.weights, newest.kv, newest.activations


async def test_another_fault_is_internal_and_its_trace_is_in_the_log_alone(fake):
    client = fake.client()
    async with serving(fake, failing(ZeroDivisionError("the secret of step 2"), at=2)) as worker:
        told = await ask(client, job_id="a", prompt="abc", max_tokens=10)
        assert (told.last.code, told.last.retriable) == ("INTERNAL", True)
        assert "secret" not in str(told.last.to_fields())
        assert "ZeroDivisionError" in told.last.message
        fault = worker.logged("engine_fault")[0]
        assert "the secret of step 2" in fault["trace"]
        assert fault["job_id"] == "a"
        assert (await ask(client, prompt="abc", max_tokens=3)).text == "abc"


async def test_a_fault_that_the_engine_names_itself_keeps_its_words(fake):
    client = fake.client()
    async with serving(fake, failing(Internal("the logits are not finite"), at=2)):
        told = await ask(client, prompt="abc", max_tokens=10)
        assert (told.last.code, told.last.message) == ("INTERNAL", "the logits are not finite")


async def test_a_lost_device_ends_the_worker_and_another_continues_the_job(harness):
    client = harness.client()
    served = failing(CudaError("an illegal address"), at=5, times=100)
    async with serving(harness, served, name="w1") as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=10)
        assert await asyncio.wait_for(worker.task, 10) == 2
    codes = [event.code for event in await own_events(harness, "w1") if isinstance(event, ErrorEvent)]
    assert codes == ["CUDA_ERROR"]
    told = await published(harness, "a")
    assert told.kinds == ["started", "token"]
    began = time.monotonic()
    async with serving(harness, Model.echo().fresh(), name="w2"):
        told = await story(client, "a")
    assert time.monotonic() - began < 4
    assert told.kinds == ["started", "token", "resumed", "token", "end"]
    assert told.text == "abcabcabca"
    assert told.of("resumed")[0].reason == "crash"
    stopped = (await own_events(harness, "w1"))[-1]
    assert (stopped.kind, stopped.exit_code) == ("stopped", 2)


async def test_an_engine_that_hangs_ends_the_worker_and_another_continues(harness):
    client, gate, model = harness.client(), Gate(at=4), Model.echo()
    served = model.fresh(Scripted(model.runner, gate.script))
    async with serving(harness, served, name="w1", stall_s=0.5) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=10)
        assert await asyncio.wait_for(worker.task, 10) == 2
        async with serving(harness, Model.echo().fresh(), name="w2"):
            told = await story(client, "a")
        gate.open()
    assert told.text == "abcabcabca"
    assert told.of("resumed")[0].from_i == len([i for i in told.items if i.kind == "token" and i.envelope.epoch == 1])


async def test_a_cancel_cannot_hang_a_worker_whose_engine_hangs(fake):
    client, gate, model = fake.client(), Gate(at=4), Model.echo()
    async with serving(fake, model.fresh(Scripted(model.runner, gate.script)), stall_s=0.5) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=10)
        await gate.until_reached()
        await client.cancel("a")
        assert await asyncio.wait_for(worker.task, 10) == 2
        gate.open()


async def test_the_third_attempt_without_a_new_token_is_a_dead_letter(harness):
    client = harness.client()
    await client.submit(job_id="poison", prompt="abc", max_tokens=10)
    for n in range(3):
        async with serving(harness, failing(CudaError("again"), at=0, times=100), name=f"w{n}") as worker:
            assert await asyncio.wait_for(worker.task, 10) == 2
    async with serving(harness, Model.echo().fresh(), name="last"):
        told = await story(client, "poison")
        assert (told.last.code, told.last.retriable) == ("DEAD_LETTERED", False)
        assert told.kinds == ["started", "resumed", "resumed", "error"]
        await gone(client)
        letter = (await client.dead_letters())[0]
        assert (letter.job_id, letter.attempts, letter.last_error) == ("poison", 3, "CUDA_ERROR")
        again = await client.retry_dead_letter(letter)
        assert (await story(client, again)).text == "abcabcabca"


async def test_attempts_with_progress_are_never_dead_letters(fake):
    client = fake.client()
    await client.submit(job_id="a", prompt="abc", max_tokens=10)
    for n in range(4):
        async with serving(fake, failing(CudaError("again"), at=2 + 2 * n, times=100), name=f"w{n}") as worker:
            assert await asyncio.wait_for(worker.task, 10) == 2
    async with serving(fake, Model.echo().fresh(), name="last"):
        assert (await story(client, "a")).text == "abcabcabca"


async def test_a_fault_while_the_prompt_is_read_is_internal_and_not_told(fake):
    model = Model.echo()

    class Broken:
        vocab = model.served.tokenizer.vocab

        def encode_prompt(self, text, *, special=True):
            raise RuntimeError(f"I can't read {text}")

    client = fake.client()
    async with serving(fake, model.fresh(tokenizer=Broken())) as worker:
        told = await ask(client, prompt="my private words", max_tokens=5)
        assert (told.kinds, told.last.code) == (["error"], "INTERNAL")
        assert "private" not in told.last.message
        assert "private" not in worker.output.getvalue()
        assert any("encode_prompt" in frame for frame in worker.logged("job_fault")[0]["frames"])


async def test_an_entry_that_the_server_refuses_does_not_end_the_worker(fake):
    client = fake.client()
    await fake.raw.set("inf:{job:a}:events", "no stream at all")
    async with serving(fake, Model.echo().fresh()) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=5)
        await wait_until(lambda: _true(bool(worker.logged("attempt_fault"))))
        assert (await ask(client, prompt="abc", max_tokens=3)).text == "abc"


async def test_memory_is_told_as_the_device_gives_it(fake):
    model, client = Model.echo(), fake.client()
    use = MemoryUse(weights=500, kv=40, activations=3, runtime=2, free=1000)
    lease = LeaseSection(**{**QUICK.model_dump()})
    async with serving(fake, model.fresh(device=FixedDevice(use)), lease=lease, metrics_ms=250) as worker:
        assert await wait_for_vram(fake, worker) == (500, 40, 3)
        slowly = Scripted(model.runner, lambda step: time.sleep(0.02))
        worker.engine._runner = slowly
        told = await ask(client, prompt="abc", max_tokens=40)
        assert {(m.vram_used, m.vram_free) for m in told.of("metrics")} == {(545, 1000)}
