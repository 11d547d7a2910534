"""The prefix cache as seen by jobs and operators: cached tokens as published are not computed."""

from __future__ import annotations

import pytest

from tests.jobs.harness import wait_until
from tests.models import free_kv_blocks
from tests.service.jobs import PROMPT_TOKENS, crashed_attempt, reference_tokens
from tests.service.models import ScriptedRunner, SharedModel, StepBarrier
from tests.service.serving import http_get, read_job, run_job, serving
from worker.errors import VramOom

FIELDS = {"seed": 7, "temperature": 0.8, "max_tokens": 12, "ignore_eos": True}


class CountingRunner:
    """A runner that counts the prompt tokens that it computes."""

    def __init__(self, runner):
        self.vocab_size, self.kv_blocks, self.slots, self.prefilled = runner.vocab_size, runner.kv_blocks, 1, 0
        self.stop, self.extend, self.reset = runner.stop, runner.extend, runner.reset
        self.first_draws, self.step_wait = runner.first_draws, None
        self._runner = runner

    def run(self, chunks, on_launched):
        self.prefilled += sum(len(chunk.tokens) for chunk in chunks)
        return self._runner.run(chunks, on_launched)


async def blocks(worker):
    """The engine's KV blocks by state, once no job holds any."""

    async def unused():
        return worker.engine.kv_blocks["used"] == 0

    await wait_until(unused)
    return worker.engine.kv_blocks


@pytest.mark.parametrize("name", ["qwen2", "gpt-oss"])
async def test_a_second_job_computes_and_reports_only_the_rest_and_gets_the_same_tokens(harness, model, name):
    client, runner = harness.client(), CountingRunner(model(name).runner)
    other = [*PROMPT_TOKENS[:70], *PROMPT_TOKENS[:9]]
    async with serving(harness, model(name).fresh(runner)):
        for prompt, cached in ((PROMPT_TOKENS, 0), (PROMPT_TOKENS, 96), (other, 64)):
            before = runner.prefilled
            result = await run_job(client, prompt_tokens=prompt, **FIELDS)
            assert result.cached_tokens == cached == len(prompt) - (runner.prefilled - before)
            assert result.tokens == reference_tokens(model(name), prompt_tokens=prompt, **FIELDS)


async def test_without_the_prefix_cache_every_prompt_is_computed(fake, tiny):
    client, model = fake.client(), SharedModel.from_file(tiny("qwen2"), prefix_cache=False)
    async with serving(fake, model.fresh()) as worker:
        for _ in range(2):
            assert (await run_job(client, prompt_tokens=PROMPT_TOKENS, **FIELDS)).cached_tokens == 0
        assert (await blocks(worker))["cached"] == 0


async def test_metrics_count_hits_and_blocks_by_state(fake, model):
    client = fake.client()
    async with serving(fake, model().fresh()) as worker:
        for _ in range(2):
            await run_job(client, prompt_tokens=PROMPT_TOKENS, **FIELDS)
        count = free_kv_blocks(model().loaded.engine)
        lines = (
            "worker_tokens_in_total 200.0",
            "worker_prefix_cache_hit_tokens_total 96.0",
            'worker_kv_blocks{state="used"} 0.0',
            'worker_kv_blocks{state="cached"} 6.0',
            f'worker_kv_blocks{{state="free"}} {count - 6}.0',
        )

        async def shown():
            exposition = (await http_get(worker.service.http_port, "/metrics"))[1]
            return all(line in exposition for line in lines)

        await wait_until(shown)


async def test_a_job_is_continued_on_blocks_that_another_job_cached(fake, model):
    whole = reference_tokens(model(), prompt_tokens=PROMPT_TOKENS, **FIELDS)
    client, runner = fake.client(), CountingRunner(model().runner)
    loaded = model().fresh(runner)
    async with serving(fake, loaded, name="w1"):
        await run_job(client, prompt_tokens=[*PROMPT_TOKENS[:50], 1], **FIELDS)
    await client.submit(job_id="a", prompt_tokens=PROMPT_TOKENS, **FIELDS)
    await crashed_attempt(fake, model().fresh(), whole[:5])
    before = runner.prefilled
    async with serving(fake, loaded, name="w2"):
        result = await read_job(client, "a")
    assert result.kinds == ["started", "token", "resumed", "token", "end"]
    assert result.tokens == whole
    assert runner.prefilled - before == 100 - 48


@pytest.mark.parametrize("error", [VramOom("full"), ZeroDivisionError("a bug")])
async def test_a_failed_job_holds_no_block(fake, error):
    client, model = fake.client(), SharedModel.echo()

    def script(step):
        if step == 1:
            raise error

    async with serving(fake, model.fresh(ScriptedRunner(model.runner, script))) as worker:
        result = await run_job(client, prompt_tokens=PROMPT_TOKENS, max_tokens=9)
        assert result.last.code == ("VRAM_OOM" if isinstance(error, VramOom) else "INTERNAL")
        kept = 4 if isinstance(error, VramOom) else 0
        assert (await blocks(worker))["cached"] == kept
        again = await run_job(client, prompt_tokens=PROMPT_TOKENS, max_tokens=9)
        assert again.cached_tokens == 16 * kept


async def test_a_job_that_never_runs_releases_its_cached_prefix(fake):
    client, barrier, model = fake.client(), StepBarrier(at=20), SharedModel.echo()
    async with serving(fake, model.fresh(ScriptedRunner(model.runner, barrier.script))) as worker:
        await run_job(client, prompt_tokens=PROMPT_TOKENS, max_tokens=5)
        await client.submit(job_id="first", prompt_tokens=[1, 2], max_tokens=200, ignore_eos=True)
        await barrier.wait_until_reached()
        await client.submit(job_id="cancelled", prompt_tokens=PROMPT_TOKENS)
        assert await client.cancel("cancelled") == "cancelled"
        await client.submit(job_id="late", prompt_tokens=PROMPT_TOKENS, deadline_ms=1)
        barrier.release()
        assert (await read_job(client, "late")).kinds == ["error"]
        assert (await blocks(worker))["cached"] == 6
