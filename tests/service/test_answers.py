"""A job goes in, its answer comes out: the stream's grammar, every form of prompt, stop strings, log-probabilities."""

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
from tests.service.serving import Model, Scripted, ask, own_events, published, serving, story
from worker.answer import Answer, prompt_ids
from worker.jobs.events import Tokens, decode_event
from worker.jobs.keys import events_key, queue_key
from worker.jobs.protocol import Job, Limits, derived_seed

NOW = datetime(2026, 3, 1, tzinfo=UTC)


def undisturbed(model, entry_id="1-1", **fields):
    """The tokens that one engine draws with nobody around."""
    served = model.fresh()
    job = Job.parse({"job_id": "j", **fields})
    prompt = prompt_ids(job, served.tokenizer, NOW)
    answer = Answer(
        job,
        job.resolve(Limits(served.name, served.vocab_size, served.engine.context), len(prompt), entry_id),
        served.tokenizer,
        prompt,
    )
    served.engine.add(answer.sequence)
    tokens = []
    while answer.finish_reason is None:
        tokens += [token for drawn in served.engine.step() if (token := answer.push(drawn))]
    return tokens


async def settled(harness, client, *job_ids):
    """Nothing is left of the jobs but their streams, which will expire."""

    async def empty():
        return not await client.queue()

    await wait_until(empty)
    assert_none(await find_violations(harness.connect(), "default", dict.fromkeys(job_ids)))
    assert_none(keys_without_ttl(await harness.keys()))


async def test_an_answer_arrives_as_started_tokens_end(harness, model):
    fields = {"prompt": "hello harness", "seed": 7, "temperature": 0.8, "max_tokens": 20, "ignore_eos": True}
    client = harness.client()
    async with serving(harness, model().fresh()) as worker:
        told = await ask(client, job_id="a", **fields)
        await settled(harness, client, "a")
    assert told.kinds == ["started", "token", "end"]
    assert told.tokens == undisturbed(model(), **fields)
    started, end = told.of("started")[0], told.last
    served = model().served
    ids = served.tokenizer.encode_prompt("hello harness")
    assert (started.model, started.fingerprint) == (served.name, served.fingerprint)
    assert (started.seed, started.max_tokens) == (7, 20)
    assert (started.prompt_tokens, started.cached_tokens) == (len(ids), 0)
    assert started.prompt_hash == hashlib.sha256(np.array(ids, "<u4").tobytes()).hexdigest()
    assert 0 <= started.started_at - started.enqueued_at < 5000
    assert (end.finish_reason, end.tokens_out, end.prompt_tokens) == ("length", 20, len(ids))
    assert 0 < end.ttft_ms < 5000
    assert 0 <= end.decode_ms < 5000
    assert {item.envelope.worker_id for item in told.items} == {worker.name}
    assert len({(i.envelope.correlation_id, i.envelope.traceparent, i.envelope.v) for i in told.items}) == 1


async def test_jobs_are_answered_one_after_another_as_by_fresh_workers(fake, model):
    client = fake.client()
    jobs = {f"j{n}": {"prompt": "the quick"[n:], "seed": n, "max_tokens": 9, "ignore_eos": True} for n in range(5)}
    for job_id, fields in jobs.items():
        await client.submit(job_id=job_id, **fields)
    async with serving(fake, model().fresh()):
        for job_id, fields in jobs.items():
            assert (await story(client, job_id)).tokens == undisturbed(model(), **fields)
        await settled(fake, client, *jobs)


@pytest.mark.parametrize("name", ["qwen2", "phi3", "gpt-oss", "llama"])
async def test_every_form_of_prompt(fake, model, name):
    client, chat = fake.client(), [{"role": "user", "content": "hello <|im_end|> harness"}]
    forms = [
        {"prompt": "hello <|endoftext|> harness"},
        {"prompt": "hello <|endoftext|> harness", "special": False},
        {"messages": chat},
        {"prompt_tokens": [5, 6, 7]},
    ]
    tokenizer = model(name).served.tokenizer
    async with serving(fake, model(name).fresh()):
        for form in forms:
            told = await ask(client, max_tokens=3, temperature=0, **form)
            ids = prompt_ids(Job.parse({"job_id": "j", **form}), tokenizer, datetime.now(UTC))
            assert told.of("started")[0].prompt_tokens == len(ids), form
            assert told.kinds == ["started", "token", "end"]


async def test_a_json_job_by_bare_xadd_is_answered(harness, model):
    payload = {"job_id": "by-hand", "prompt": "hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    client = harness.client()
    traceparent = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
    async with serving(harness, model().fresh()):
        fields = {"p": json.dumps(payload, indent=1).encode(), "traceparent": traceparent.encode()}
        entry_id = await harness.connect().enqueue("default", fields, 100)
        told = await story(client, "by-hand")
    assert told.last.tokens_out == 4
    assert told.of("started")[0].seed == derived_seed("by-hand", entry_id)
    assert told.of("started")[0].enqueued_at == int(entry_id.split("-")[0])
    assert {item.envelope.traceparent for item in told.items} == {traceparent}


async def test_the_ids_that_a_job_brings_are_on_every_event(fake, model):
    client = fake.client()
    async with serving(fake, model().fresh()):
        told = await ask(client, prompt="x", max_tokens=2, correlation_id="order 5", traceparent="00-1-2-01")
        assert {i.envelope.correlation_id for i in told.items} == {"order 5"}
        assert {i.envelope.traceparent for i in told.items} == {"00-1-2-01"}


async def test_max_tokens_is_cut_to_what_the_context_leaves(fake, model):
    client, context = fake.client(), model().served.engine.context
    async with serving(fake, model().fresh()):
        told = await ask(client, prompt_tokens=[5] * (context - 3), ignore_eos=True)
        assert told.of("started")[0].max_tokens == 3
        assert told.last.tokens_out == 3


async def test_a_stop_string_across_tokens_ends_the_answer_unpublished(harness, model):
    fields = {"prompt": "the quick", "seed": 5, "max_tokens": 40, "ignore_eos": True}
    whole = undisturbed(model(), **fields)
    text = "".join(token.t for token in whole)
    stop = next(a.t + b.t for a, b in pairwise(whole[4:]) if a.t and b.t)
    client = harness.client()
    async with serving(harness, model().fresh()) as worker:
        told = await ask(client, stop=[stop, "nowhere to be found"], **fields)
        assert worker.engine.free_kv_blocks == model().served.engine.free_kv_blocks
    assert (told.last.finish_reason, told.last.stop_sequence) == ("stop_sequence", stop)
    assert told.text == text[: text.index(stop)]
    assert told.last.tokens_out == len(told.tokens)


async def test_an_end_token_is_published_and_ends_the_answer(fake, model):
    client, end_id = fake.client(), min(model().served.tokenizer.vocab.end_ids)
    async with serving(fake, model().fresh()):
        told = await ask(client, prompt="x", logit_bias={end_id: 100}, max_tokens=5, temperature=0)
        assert (told.last.finish_reason, told.ids) == ("stop", [end_id])
        told = await ask(client, prompt="x", logit_bias={end_id: 100}, min_tokens=3, max_tokens=5, temperature=0)
        assert len(told.ids) == 4
        assert told.ids[3] == end_id


async def test_log_probabilities_come_with_each_token(fake, model):
    client = fake.client()
    async with serving(fake, model().fresh()):
        told = await ask(client, prompt="x", max_tokens=4, temperature=0, logprobs=3, ignore_eos=True)
        for token in told.tokens:
            assert [logprob for _, logprob in token.top] == sorted((lp for _, lp in token.top), reverse=True)
            drawable = [pair for pair in token.top if pair[0] not in model().served.tokenizer.vocab.padding_ids]
            assert not drawable or drawable[0] == (token.id, token.logprob)
        bare = await ask(client, prompt="x", max_tokens=4, temperature=0, ignore_eos=True)
        assert [(token.logprob, token.top) for token in bare.tokens] == [(None, None)] * 4


async def test_channels_of_gpt_oss_are_told_apart(fake, model):
    vocab = model("gpt-oss").served.tokenizer.vocab
    tokenizer, special = model("gpt-oss").served.tokenizer, vocab.special
    answer = [
        *(special["<|channel|>"], *tokenizer.encode("analysis"), special["<|message|>"], *tokenizer.encode("hm")),
        *(special["<|end|>"], special["<|start|>"], *tokenizer.encode("assistant"), special["<|channel|>"]),
        *(*tokenizer.encode("final"), special["<|message|>"], *tokenizer.encode("yes"), special["<|return|>"]),
    ]
    client = fake.client()
    echo = Model.echo().runner
    echo.vocab_size = vocab.size
    served = model("gpt-oss").fresh(_Saying(echo, answer))
    async with serving(fake, served):
        told = await ask(client, messages=[{"role": "user", "content": "hi"}])
    assert told.ids == answer
    said = {channel: "".join(t.t for t in told.tokens if t.channel == channel) for channel in ("analysis", "final")}
    assert said == {"analysis": "hm", "final": "yes"}
    assert told.text == "hmyes"


class _Saying(Scripted):
    """A runner that draws a given answer."""

    def __init__(self, runner, answer):
        super().__init__(runner, lambda step: None)
        self._answer = answer

    def run(self, batch, requests, on_launched):
        draws = super().run(batch, requests, on_launched)
        return [type(d)(self._answer[r.index]) for d, r in zip(draws, requests, strict=True)]


async def test_tokens_coalesce_after_the_first(harness):
    model, client = Model.echo(), harness.client()
    async with serving(harness, model.fresh()):
        told = await ask(client, job_id="a", prompt="abc", max_tokens=400)
        records = await harness.connect().range(events_key("a"), "-", "+", 10_000)
    entries = [decode_event(f["type"].decode(), f["p"])[0] for _, f in records]
    sizes = [len(entry.tokens) for entry in entries if isinstance(entry, Tokens)]
    assert sum(sizes) == 400
    assert max(sizes) <= 16
    assert len(sizes) < 100, "a fast engine's tokens wait for each other"
    assert told.text == ("abc" * 134)[:400]


async def test_a_slow_answer_is_published_within_20_ms_of_each_token(fake):
    model, client = Model.echo(), fake.client()
    served = model.fresh(Scripted(model.runner, lambda step: time.sleep(0.05)))
    async with serving(fake, served):
        told = await ask(client, prompt="abc", max_tokens=8)
    entries = [item.entry_id for item in told.items if item.kind == "token"]
    assert len(set(entries)) == 8


async def test_metrics_come_every_250_to_1000_ms(fake):
    model, client = Model.echo(), fake.client()
    served = model.fresh(Scripted(model.runner, lambda step: time.sleep(0.01)))
    async with serving(fake, served, metrics_ms=250):
        told = await ask(client, prompt="abc", max_tokens=150)
    at = [item.envelope.ts_ms for item in told.items if item.kind == "metrics"]
    assert len(at) >= 4
    assert all(200 <= later - earlier <= 1000 for earlier, later in pairwise(at))
    first, last = told.of("metrics")[0], told.of("metrics")[-1]
    assert 0 < first.tokens_out < last.tokens_out <= 150
    assert 20 < last.tokens_per_second < 110
    assert last.decode_ms > first.decode_ms


async def test_two_entries_of_one_job_run_once(harness):
    model, client = Model.echo(), harness.client()
    payload = msgpack.packb({"job_id": "twice", "prompt": "abc", "max_tokens": 5})
    streams = harness.connect()
    for _ in range(2):
        await streams.enqueue("default", {"p": payload}, 100)
    async with serving(harness, model.fresh()):
        await story(client, "twice")
        await settled(harness, client, "twice")
        told = await published(harness, "twice")
    assert told.kinds == ["started", "token", "end"]
    assert await streams.range(queue_key("default"), "-", "+", 10) == []


async def test_the_worker_says_what_happens_to_it(harness, model):
    client = harness.client()
    async with serving(harness, model().fresh(), name="w1-1-abc") as worker:
        await ask(client, prompt="x", max_tokens=3)
        await ask(client, prompt="x", max_tokens=100_000)

        async def registered():
            status = (await client.workers()).get("w1-1-abc", {})
            return (status.get("name"), status.get("model")) == ("w1", model().served.name)

        await wait_until(registered)
        assert await worker.stop() == 0
        assert await client.workers() == {}
    events = await own_events(harness, "w1-1-abc")
    kinds = [event.kind for event in events]
    assert kinds[0] == "starting"
    assert [event.percent for event in events if event.kind == "load_progress"] == [0, 25, 50, 75, 100]
    assert kinds.index("load_progress") < kinds.index("ready") < kinds.index("vram")
    assert "residency" in kinds
    assert [event.code for event in events if event.kind == "error"] == ["INVALID_REQUEST"]
    assert kinds.count("vram") >= 3
    assert "draining" in kinds
    assert kinds[-1] == "stopped"
    vram = next(event for event in events if event.kind == "vram")
    assert vram.weights > vram.kv > 0
    assert vram.free > 0
