"""A worker whose template, regular expressions or native libraries fail: its other jobs go on."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace

import psutil
import pytest

from tests.jobs.harness import Harness, wait_until
from tests.service.serving import LONG_LEASE, published_events, read_job, serving, worker_events
from tests.text.small import tokenizer_of
from worker.echo import load_echo
from worker.runtime import LoadedModel
from worker.text.template_process import TemplateProcess

SLOW = "{% if messages[0].content == 'slow' %}" + "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3 + "{% endif %}"
TEMPLATE = (
    SLOW
    + "{% if messages[0].content == 'large' %}{{ 'a' * 10**10 }}{% endif %}"
    + r"{% if messages[0].content == 'surrogate' %}{{ raise_exception('no \ud800') }}{% endif %}"
    + "{{ messages[0].content }}"
)


def chat(text: str) -> dict:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 4}


def model(step_s: float = 0.01) -> LoadedModel:
    """An echo model of four slots with the template."""
    loaded = load_echo(4096, 64, step_s, lambda done, total: None, max_running=4)
    vocab = loaded.tokenizer.vocab
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": vocab.tokens,
        "tokenizer.ggml.token_type": vocab.types,
        "tokenizer.ggml.scores": [0.0] * vocab.size,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }
    return replace(loaded, tokenizer=tokenizer_of(metadata, **{"tokenizer.chat_template": TEMPLATE}))


async def tokens_of(harness: Harness, job_id: str) -> int:
    return len((await published_events(harness, job_id)).tokens)


async def test_other_jobs_get_their_tokens_while_a_template_is_rendered(fake: Harness) -> None:
    client = fake.client()
    async with serving(fake, model(), lease=LONG_LEASE):
        await client.submit(job_id="running", prompt="abcd", max_tokens=1000)
        await wait_until(lambda: tokens_of(fake, "running"))
        await client.submit(job_id="slow", **chat("slow"))
        before = await tokens_of(fake, "running")
        slow = asyncio.create_task(read_job(client, "slow"))
        for n in range(5):  # begun and ended meanwhile
            await client.submit(job_id=f"prompt-{n}", prompt="efgh", max_tokens=4)
            assert (await read_job(client, f"prompt-{n}")).text == "efgh"
        assert not slow.done()
        result = await slow
        meanwhile = await tokens_of(fake, "running") - before
        await client.cancel("running")
    assert result.last.code == "INVALID_REQUEST"
    assert "the model's chat template fails on them: it takes more than 2 s" in result.last.message
    assert meanwhile > 40  # of 2 s of steps of 10 ms, on a busy machine


async def test_a_chat_after_a_hostile_one_is_answered(fake: Harness) -> None:
    client = fake.client()
    async with serving(fake, model(), lease=LONG_LEASE):
        for job_id, text in enumerate(("large", "abcd", "slow", "efgh")):
            await client.submit(job_id=str(job_id), **chat(text))
        results = [await read_job(client, str(job_id)) for job_id in range(4)]
    assert [result.last.code for result in results[::2]] == ["INVALID_REQUEST"] * 2
    assert [result.text for result in results[1::2]] == ["abcd", "efgh"]


@pytest.mark.parametrize("encoding", ["msgpack", "json"])
async def test_a_template_that_rejects_a_chat_with_a_lone_surrogate_fails_the_job(harness: Harness, encoding) -> None:
    client = harness.client()
    async with serving(harness, model()) as worker:
        await client.submit(job_id="a", encoding=encoding, **chat("surrogate"))
        result = await read_job(client, "a")
    assert (result.last.code, result.kinds) == ("INVALID_REQUEST", ["error"])
    assert r"no \ud800" in result.last.message
    assert [event.message for event in await worker_events(harness, worker.name) if event.kind == "error"] == [
        result.last.message
    ]


async def test_a_job_whose_rendering_is_killed_is_answered(fake: Harness, template_process: TemplateProcess) -> None:
    client = fake.client()
    async with serving(fake, model(), lease=LONG_LEASE):
        await client.submit(job_id="slow", **chat("slow"))
        child = psutil.Process(template_process.pid)
        begun = child.cpu_times().user
        await wait_until(lambda: _true(child.cpu_times().user > begun + 0.3))
        os.kill(child.pid, signal.SIGKILL)
        await client.submit(job_id="next", **chat("abcd"))
        results = [await read_job(client, job_id) for job_id in ("slow", "next")]
    assert results[0].last.code == "INVALID_REQUEST"
    assert "more than 2 s" in results[0].last.message
    assert results[1].text == "abcd"


async def _true(value: bool) -> bool:
    return value


class PanicException(BaseException):
    """Stands for pyo3's."""


@pytest.mark.parametrize("call", ["decode_job", "tokenize_job"])
async def test_a_panic_while_a_job_is_prepared_ends_that_job_alone(fake: Harness, monkeypatch, call: str) -> None:
    client, module = fake.client(), "worker.service." + ("attempt" if call == "decode_job" else "prepared_job")
    original = getattr(__import__(module, fromlist=[call]), call)

    def panicking(*args):
        if "panic" in str(args):
            raise PanicException("called `Option::unwrap()` on a `None` value")
        return original(*args)

    monkeypatch.setattr(f"{module}.{call}", panicking)
    async with serving(fake, model(), lease=LONG_LEASE) as worker:
        await client.submit(job_id="panics", prompt="panic", max_tokens=4)
        await client.submit(job_id="b", prompt="abcd", max_tokens=4)
        assert (await read_job(client, "b")).text == "abcd"
        if call == "tokenize_job":
            result = await read_job(client, "panics")
            assert (result.last.code, "PanicException" in result.last.message) == ("INTERNAL", True)
        assert worker.logged("job_fault")
        assert not worker.task.done()


async def test_a_panic_of_a_step_ends_its_jobs_alone(fake: Harness, monkeypatch) -> None:
    loaded = model()
    run, panics = loaded.engine._runner.run, [True]

    def panicking(*args, **kwargs):
        if panics and panics.pop():
            raise PanicException("index out of bounds")
        return run(*args, **kwargs)

    monkeypatch.setattr(loaded.engine._runner, "run", panicking)
    client = fake.client()
    async with serving(fake, loaded, lease=LONG_LEASE):
        await client.submit(job_id="a", prompt="abcd", max_tokens=4)
        result = await read_job(client, "a")
        assert (result.last.code, "NativePanic" in result.last.message) == ("INTERNAL", True)
        await client.submit(job_id="b", prompt="efgh", max_tokens=4)
        assert (await read_job(client, "b")).text == "efgh"
