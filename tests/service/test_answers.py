"""Jobs and their answers: event grammar, forms of prompts, stop strings, log-probabilities."""

from __future__ import annotations

import hashlib
import json
import time
from datetime import UTC, datetime
from itertools import pairwise

import msgpack
import numpy as np
import pytest

from tests.jobs.harness import wait_until
from tests.jobs.stream_checker import assert_none, find_violations, keys_without_ttl
from tests.models import free_kv_blocks
from tests.service.jobs import reference_tokens
from tests.service.models import ScriptedRunner, SharedModel
from tests.service.serving import published_events, read_job, run_job, serving, wait_until_queue_is_empty, worker_events
from worker.answer import prompt_ids
from worker.jobs.events import Tokens, decode_event
from worker.jobs.keys import events_key, queue_key
from worker.jobs.protocol import Job, derived_seed
from worker.model import SlotDraw
from worker.sampling import Draw


async def check_settled(harness, client, *job_ids):
    """Nothing is left of the jobs but their streams, which will expire."""
    await wait_until_queue_is_empty(client)
    assert_none(await find_violations(harness.connect(), "default", dict.fromkeys(job_ids)))
    assert_none(keys_without_ttl(await harness.keys()))


async def test_an_answer_is_published_as_started_tokens_end(harness, model):
    fields = {"prompt": "hello world", "seed": 7, "temperature": 0.8, "max_tokens": 20, "ignore_eos": True}
    client = harness.client()
    async with serving(harness, model().fresh()) as worker:
        result = await run_job(client, job_id="a", **fields)
        await check_settled(harness, client, "a")
    assert result.kinds == ["started", "token", "end"]
    assert result.tokens == reference_tokens(model(), **fields)
    started, end = result.of("started")[0], result.last
    loaded = model().loaded
    ids = loaded.tokenizer.encode_prompt("hello world")
    assert (started.model, started.fingerprint) == (loaded.name, loaded.fingerprint)
    assert (started.seed, started.max_tokens) == (7, 20)
    assert (started.prompt_tokens, started.cached_tokens) == (len(ids), 0)
    assert started.prompt_hash == hashlib.sha256(np.array(ids, "<u4").tobytes()).hexdigest()
    assert 0 <= started.started_at - started.enqueued_at < 5000
    assert (end.finish_reason, end.tokens_out, end.prompt_tokens) == ("length", 20, len(ids))
    assert 0 < end.ttft_ms < 5000
    assert 0 <= end.decode_ms < 5000
    assert {item.envelope.worker_id for item in result.items} == {worker.name}
    assert len({(i.envelope.correlation_id, i.envelope.traceparent, i.envelope.v) for i in result.items}) == 1


async def test_each_of_several_jobs_is_answered_as_by_a_fresh_worker(fake, model):
    client = fake.client()
    jobs = {f"j{n}": {"prompt": "the quick"[n:], "seed": n, "max_tokens": 9, "ignore_eos": True} for n in range(5)}
    for job_id, fields in jobs.items():
        await client.submit(job_id=job_id, **fields)
    async with serving(fake, model().fresh()):
        for job_id, fields in jobs.items():
            assert (await read_job(client, job_id)).tokens == reference_tokens(model(), **fields)
        await check_settled(fake, client, *jobs)


@pytest.mark.parametrize("name", ["qwen2", "phi3", "gpt-oss", "llama"])
async def test_every_form_of_prompt_is_answered(fake, model, name):
    client, chat = fake.client(), [{"role": "user", "content": "hello <|im_end|> world"}]
    forms = [
        {"prompt": "hello <|endoftext|> world"},
        {"prompt": "hello <|endoftext|> world", "special": False},
        {"messages": chat},
        {"prompt_tokens": [5, 6, 7]},
    ]
    tokenizer = model(name).loaded.tokenizer
    async with serving(fake, model(name).fresh()):
        for form in forms:
            result = await run_job(client, max_tokens=3, temperature=0, **form)
            ids = prompt_ids(Job.parse({"job_id": "j", **form}), tokenizer, datetime.now(UTC))
            assert result.of("started")[0].prompt_tokens == len(ids), form
            assert result.kinds == ["started", "token", "end"]


async def test_a_json_job_added_by_xadd_is_answered(harness, model):
    payload = {"job_id": "by-hand", "prompt": "hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    client = harness.client()
    traceparent = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
    async with serving(harness, model().fresh()):
        fields = {"p": json.dumps(payload, indent=1).encode(), "traceparent": traceparent.encode()}
        entry_id = await harness.connect().enqueue("default", fields, 100)
        result = await read_job(client, "by-hand")
    assert result.last.tokens_out == 4
    assert result.of("started")[0].seed == derived_seed("by-hand", entry_id)
    assert result.of("started")[0].enqueued_at == int(entry_id.split("-")[0])
    assert {item.envelope.traceparent for item in result.items} == {traceparent}


async def test_the_trace_ids_of_a_job_are_on_every_event(fake, model):
    client = fake.client()
    async with serving(fake, model().fresh()):
        result = await run_job(client, prompt="x", max_tokens=2, correlation_id="order 5", traceparent="00-1-2-01")
        assert {i.envelope.correlation_id for i in result.items} == {"order 5"}
        assert {i.envelope.traceparent for i in result.items} == {"00-1-2-01"}


async def test_max_tokens_is_cut_to_what_the_context_leaves(fake, model):
    client, context = fake.client(), model().loaded.engine.context
    async with serving(fake, model().fresh()):
        result = await run_job(client, prompt_tokens=[5] * (context - 3), ignore_eos=True)
        assert result.of("started")[0].max_tokens == 3
        assert result.last.tokens_out == 3


async def test_a_stop_string_across_tokens_ends_the_answer_unpublished(harness, model):
    fields = {"prompt": "the quick", "seed": 5, "max_tokens": 40, "ignore_eos": True}
    whole = reference_tokens(model(), **fields)
    text = "".join(token.t for token in whole)
    stop = next(a.t + b.t for a, b in pairwise(whole[4:]) if a.t and b.t)
    client = harness.client()
    async with serving(harness, model().fresh()) as worker:
        result = await run_job(client, stop=[stop, "not in the text"], **fields)
        assert free_kv_blocks(worker.engine) == free_kv_blocks(model().loaded.engine)
    assert (result.last.finish_reason, result.last.stop_sequence) == ("stop_sequence", stop)
    assert result.text == text[: text.index(stop)]
    assert result.last.tokens_out == len(result.tokens)


async def test_an_end_token_is_published_and_ends_the_answer(fake, model):
    client, end_id = fake.client(), min(model().loaded.tokenizer.vocab.end_ids)
    async with serving(fake, model().fresh()):
        result = await run_job(client, prompt="x", logit_bias={end_id: 100}, max_tokens=5, temperature=0)
        assert (result.last.finish_reason, result.ids) == ("stop", [end_id])
        result = await run_job(client, prompt="x", logit_bias={end_id: 100}, min_tokens=3, max_tokens=5, temperature=0)
        assert len(result.ids) == 4
        assert result.ids[3] == end_id


async def test_log_probabilities_come_with_each_token(fake, model):
    client = fake.client()
    async with serving(fake, model().fresh()):
        result = await run_job(client, prompt="x", max_tokens=4, temperature=0, logprobs=3, ignore_eos=True)
        for token in result.tokens:
            assert [logprob for _, logprob in token.top] == sorted((lp for _, lp in token.top), reverse=True)
            drawable = [pair for pair in token.top if pair[0] not in model().loaded.tokenizer.vocab.padding_ids]
            assert not drawable or drawable[0] == (token.id, token.logprob)
        bare = await run_job(client, prompt="x", max_tokens=4, temperature=0, ignore_eos=True)
        assert [(token.logprob, token.top) for token in bare.tokens] == [(None, None)] * 4


async def test_tokens_of_gpt_oss_are_published_with_their_channel(fake, model):
    vocab = model("gpt-oss").loaded.tokenizer.vocab
    tokenizer, special = model("gpt-oss").loaded.tokenizer, vocab.special
    answer = [
        *(special["<|channel|>"], *tokenizer.encode("analysis"), special["<|message|>"], *tokenizer.encode("hm")),
        *(special["<|end|>"], special["<|start|>"], *tokenizer.encode("assistant"), special["<|channel|>"]),
        *(*tokenizer.encode("final"), special["<|message|>"], *tokenizer.encode("yes"), special["<|return|>"]),
    ]
    client = fake.client()
    echo = SharedModel.echo().runner
    echo.vocab_size = vocab.size
    loaded = model("gpt-oss").fresh(_AnswerRunner(echo, answer))
    async with serving(fake, loaded):
        result = await run_job(client, messages=[{"role": "user", "content": "hi"}])
    assert result.ids == answer
    text = {channel: "".join(t.t for t in result.tokens if t.channel == channel) for channel in ("reasoning", "final")}
    assert text == {"reasoning": "hm", "final": "yes"}
    assert result.text == "hmyes"


class _AnswerRunner(ScriptedRunner):
    """A runner that draws the tokens of `answer`."""

    def __init__(self, runner, answer):
        super().__init__(runner, lambda step: None)
        self._answer = iter(answer)

    def run(self, chunks, on_launched):
        return [SlotDraw(slot, Draw(next(self._answer))) for slot, _ in super().run(chunks, on_launched)]


async def test_tokens_after_the_first_are_published_in_batches(harness):
    model, client = SharedModel.echo(), harness.client()
    async with serving(harness, model.fresh()):
        result = await run_job(client, job_id="a", prompt="abc", max_tokens=400)
        records = await harness.connect().range(events_key("a"), "-", "+", 10_000)
    entries = [decode_event(f["type"].decode(), f["p"])[0] for _, f in records]
    sizes = [len(entry.tokens) for entry in entries if isinstance(entry, Tokens)]
    assert sum(sizes) == 400
    assert max(sizes) <= 16
    assert len(sizes) < 100, "the tokens of a fast engine are not batched"
    assert result.text == ("abc" * 134)[:400]


async def test_a_slow_answer_is_published_within_20_ms_of_each_token(fake):
    model, client = SharedModel.echo(), fake.client()
    loaded = model.fresh(ScriptedRunner(model.runner, lambda step: time.sleep(0.05)))
    async with serving(fake, loaded):
        result = await run_job(client, prompt="abc", max_tokens=8)
    entries = [item.entry_id for item in result.items if item.kind == "token"]
    assert len(set(entries)) == 8


async def test_metrics_are_published_every_250_to_1000_ms(fake):
    model, client = SharedModel.echo(), fake.client()
    loaded = model.fresh(ScriptedRunner(model.runner, lambda step: time.sleep(0.01)))
    async with serving(fake, loaded, metrics_ms=250):
        result = await run_job(client, prompt="abc", max_tokens=150)
    at = [item.envelope.ts_ms for item in result.items if item.kind == "metrics"]
    assert len(at) >= 4
    assert all(200 <= later - earlier <= 1000 for earlier, later in pairwise(at))
    first, last = result.of("metrics")[0], result.of("metrics")[-1]
    assert 0 < first.tokens_out < last.tokens_out <= 150
    assert 20 < last.tokens_per_second < 110
    assert last.decode_ms > first.decode_ms


async def test_two_entries_of_one_job_run_once(harness):
    model, client = SharedModel.echo(), harness.client()
    payload = msgpack.packb({"job_id": "twice", "prompt": "abc", "max_tokens": 5})
    streams = harness.connect()
    for _ in range(2):
        await streams.enqueue("default", {"p": payload}, 100)
    async with serving(harness, model.fresh()):
        await read_job(client, "twice")
        await check_settled(harness, client, "twice")
        result = await published_events(harness, "twice")
    assert result.kinds == ["started", "token", "end"]
    assert await streams.range(queue_key("default"), "-", "+", 10) == []


async def test_a_worker_reports_its_own_life(harness, model):
    client = harness.client()
    async with serving(harness, model().fresh(), name="w1-1-abc") as worker:
        await run_job(client, prompt="x", max_tokens=3)
        await run_job(client, prompt="x", max_tokens=100_000)

        async def registered():
            status = (await client.workers()).get("w1-1-abc", {})
            return (status.get("name"), status.get("model")) == ("w1", model().loaded.name)

        async def reported_memory():
            return [event.kind for event in await worker_events(harness, worker.name)].count("vram") >= 2

        await wait_until(registered)
        await wait_until(reported_memory)  # at the start and after a job; close edges are reported once
        assert await worker.stop() == 0
        assert await client.workers() == {}
    events = await worker_events(harness, "w1-1-abc")
    kinds = [event.kind for event in events]
    assert kinds[0] == "starting"
    assert [event.percent for event in events if event.kind == "load_progress"] == [0, 25, 50, 75, 100]
    assert kinds.index("load_progress") < kinds.index("ready") < kinds.index("vram")
    assert "residency" in kinds
    assert [event.code for event in events if event.kind == "error"] == ["INVALID_REQUEST"]
    assert "draining" in kinds
    assert kinds[-1] == "stopped"
    vram = next(event for event in events if event.kind == "vram")
    assert vram.weights > vram.kv > 0
    assert vram.free > 0
