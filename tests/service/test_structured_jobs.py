"""Jobs with `response_format`: their answers, takeovers, refusals, and the jobs beside them."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time

import jsonschema
import pytest

from tests.jobs.harness import FakeRedisHarness
from tests.service.jobs import crashed_attempt, reference_tokens
from tests.service.models import SharedModel
from tests.service.serving import read_job, run_job, serving
from worker.jobs.keys import queue_key
from worker.text import grammar as grammar_module
from worker.text import grammar_vocabulary

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": SCHEMA}}
JOB = {"prompt": "hello world", "seed": 11, "temperature": 0.9, "max_tokens": 80, "response_format": FORMAT}
HOSTILE = {"type": "json_schema", "json_schema": {"schema": {"type": "integer", "multipleOf": 1_000_003}}}


@pytest.mark.parametrize("name", ["qwen2", "phi3"])
async def test_an_answer_is_valid_and_that_of_a_run_without_a_service(harness, model, name):
    expected = reference_tokens(model(name), **JOB)
    client = harness.client()
    async with serving(harness, model(name).fresh()):
        result = await run_job(client, **JOB)
    assert result.tokens == expected
    assert result.last.finish_reason == "stop"
    jsonschema.validate(json.loads(result.text), SCHEMA)


async def test_an_answer_is_continued_at_any_token(model):
    shared = model()
    whole = reference_tokens(shared, **JOB)
    assert len(whole) > 10
    for cut in (*range(0, len(whole), 4), len(whole)):
        harness = FakeRedisHarness()
        client = harness.client()
        await client.submit(job_id="a", **JOB)
        await crashed_attempt(harness, shared.fresh(), whole[:cut])
        async with serving(harness, shared.fresh()):
            result = await read_job(client, "a")
        assert result.tokens == whole, f"cut at {cut}"
        assert result.of("resumed")[0].exact
        assert result.last.finish_reason == "stop"
        await harness.close()


async def test_three_jobs_at_a_time_get_the_tokens_that_each_gets_alone(fake, model, tiny):
    fields = [{**JOB, "seed": seed, "temperature": seed / 4} for seed in range(1, 7)]
    expected = [reference_tokens(model(), **each) for each in fields]
    client = fake.client()
    async with serving(fake, SharedModel.from_file(tiny("qwen2"), max_running=3).fresh()):
        results = await asyncio.gather(*(run_job(client, **each) for each in fields))
    assert [result.tokens for result in results] == expected


async def test_a_schema_that_is_not_supported_is_refused_with_keyword_and_place(fake, model):
    odd = {"type": "json_schema", "json_schema": {"schema": {"properties": {"a": {"contains": {}}}}}}
    client = fake.client()
    async with serving(fake, model().fresh()):
        refused = await run_job(client, prompt="x", response_format=odd)
        assert (await run_job(client, **JOB)).last.finish_reason == "stop"
    assert refused.kinds == ["error"]
    assert refused.last.code == "INVALID_REQUEST"
    assert refused.last.details["errors"][0]["field"] == "response_format.json_schema.schema.properties.a.contains"


async def test_a_hostile_schema_is_refused_while_another_job_runs(fake, model, tiny):
    client = fake.client()
    async with serving(fake, SharedModel.from_file(tiny("qwen2"), max_running=2).fresh()):
        began = time.monotonic()
        hostile = asyncio.create_task(run_job(client, prompt="x", response_format=HOSTILE))
        free = await run_job(client, prompt="x", max_tokens=5, ignore_eos=True)
        assert time.monotonic() - began < 1.9, "it waited for the other job's grammar"
        refused = await hostile
    assert free.last.finish_reason == "length"
    assert re.search("more than (2 s|256 MB)", refused.last.message), "the first limit depends on the machine's speed"


async def test_a_dead_end_ends_its_job_alone(fake, model):
    form = {"type": "choice", "choice": ["yes"]}
    client = fake.client()
    async with serving(fake, model().fresh()):
        failed = await run_job(client, prompt="x", response_format=form, min_tokens=50)
        assert (await run_job(client, **JOB)).last.finish_reason == "stop"
    assert (failed.last.code, failed.kinds[-1]) == ("INVALID_REQUEST", "error")
    assert "min_tokens" in failed.last.message


async def test_grammars_are_compiled_on_other_threads_and_the_trie_is_built_once_before_the_first_job(
    fake, tiny, monkeypatch
):
    builders, compilers = [], []
    build, compile_source = grammar_vocabulary.library_tokenizer, grammar_module.GrammarCompiler._compile
    monkeypatch.setattr(
        grammar_module,
        "library_tokenizer",
        lambda tokenizer: builders.append(threading.current_thread()) or build(tokenizer),
    )
    monkeypatch.setattr(
        grammar_module.GrammarCompiler,
        "_compile",
        lambda self, source: compilers.append(threading.current_thread()) or compile_source(self, source),
    )
    client = fake.client()
    async with serving(fake, SharedModel.from_file(tiny("qwen2")).fresh()):
        assert len(builders) == 1
        for seed in range(2):
            await run_job(client, **{**JOB, "seed": seed})
    assert len(builders) == 1
    assert len(compilers) == 1
    assert threading.main_thread() not in (*builders, *compilers)


async def test_a_job_of_a_newer_version_is_refused_by_that(fake, model):
    await fake.connect().enqueue("default", {"p": b'{"job_id": "a", "prompt": "x", "v": 3, "new_field": 1}'}, 10)
    client = fake.client()
    async with serving(fake, model().fresh()):
        refused = await read_job(client, "a")
    assert "at most 2: this worker is older than the job's schema version" in refused.last.message


async def test_the_queue_entry_of_a_job_with_a_format_has_its_version(fake):
    await fake.client().submit(job_id="a", **JOB)
    ((_, fields),) = await fake.connect().range(queue_key("default"), "-", "+", 1)
    assert b"\xa1v\x02" in fields["p"]
