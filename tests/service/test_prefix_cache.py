"""The prefix cache as jobs and operators see it: `started.cached_tokens` says what was really not computed."""

from __future__ import annotations

import pytest

from tests.jobs.harness import wait_until
from tests.service.serving import Gate, Model, Scripted, ask, serving, story
from tests.service.test_answers import undisturbed
from tests.service.test_continuing import first_worker
from tests.service.test_life import get
from worker.errors import VramOom
from worker.ops import Phase

PROMPT = [n % 90 for n in range(100)]
FIELDS = {"seed": 7, "temperature": 0.8, "max_tokens": 12, "ignore_eos": True}


class Counted:
    """A runner that counts the prompt tokens that it computes."""

    def __init__(self, runner):
        self.vocab_size, self.kv_blocks, self.prefilled = runner.vocab_size, runner.kv_blocks, 0
        self._runner = runner

    def run(self, batch, requests, on_launched):
        self.prefilled += len(batch.tokens) if batch.phase is Phase.PREFILL else 0
        return self._runner.run(batch, requests, on_launched)


def cached(told):
    return told.of("started")[0].cached_tokens


async def blocks(worker):
    """The engine's KV blocks by state, once nothing of a job is left."""

    async def unread():
        return worker.engine.kv_blocks["used"] == 0

    await wait_until(unread)
    return worker.engine.kv_blocks


@pytest.mark.parametrize("name", ["qwen2", "gpt-oss"])
async def test_a_second_job_computes_the_rest_says_so_and_gets_the_same_tokens(harness, model, name):
    client, runner = harness.client(), Counted(model(name).runner)
    other = [*PROMPT[:70], *PROMPT[:9]]
    async with serving(harness, model(name).fresh(runner)):
        for prompt, known in ((PROMPT, 0), (PROMPT, 96), (other, 64)):
            before = runner.prefilled
            told = await ask(client, prompt_tokens=prompt, **FIELDS)
            assert cached(told) == known == len(prompt) - (runner.prefilled - before)
            assert told.tokens == undisturbed(model(name), prompt_tokens=prompt, **FIELDS)


async def test_switched_off_every_prompt_is_computed(fake, tiny):
    client, model = fake.client(), Model.from_file(tiny("qwen2"), prefix_cache=False)
    async with serving(fake, model.fresh()) as worker:
        for _ in range(2):
            assert cached(await ask(client, prompt_tokens=PROMPT, **FIELDS)) == 0
        assert (await blocks(worker))["cached"] == 0


async def test_metrics_count_hits_and_blocks_by_state(fake, model):
    client = fake.client()
    async with serving(fake, model().fresh()) as worker:
        for _ in range(2):
            await ask(client, prompt_tokens=PROMPT, **FIELDS)
        count = model().served.engine.free_kv_blocks
        lines = (
            "worker_tokens_in_total 200.0",
            "worker_prefix_cache_hit_tokens_total 96.0",
            'worker_kv_blocks{state="used"} 0.0',
            'worker_kv_blocks{state="cached"} 6.0',
            f'worker_kv_blocks{{state="free"}} {count - 6}.0',
        )

        async def shown():
            exposition = (await get(worker.service.http_port, "/metrics"))[1]
            return all(line in exposition for line in lines)

        await wait_until(shown)


async def test_a_dead_workers_job_goes_on_upon_blocks_that_another_job_left(fake, model):
    whole = undisturbed(model(), prompt_tokens=PROMPT, **FIELDS)
    client, runner = fake.client(), Counted(model().runner)
    served = model().fresh(runner)
    async with serving(fake, served, name="w1"):
        await ask(client, prompt_tokens=[*PROMPT[:50], 1], **FIELDS)
    await client.submit(job_id="a", prompt_tokens=PROMPT, **FIELDS)
    await first_worker(fake, model().fresh(), whole[:5])
    before = runner.prefilled
    async with serving(fake, served, name="w2"):
        told = await story(client, "a")
    assert told.kinds == ["started", "token", "resumed", "token", "end"]
    assert told.tokens == whole
    assert runner.prefilled - before == 100 - 48


@pytest.mark.parametrize("error", [VramOom("full"), ZeroDivisionError("a bug")])
async def test_a_failed_job_leaves_no_reader_behind(fake, error):
    client, model = fake.client(), Model.echo()

    def script(step):
        if step == 1:
            raise error

    async with serving(fake, model.fresh(Scripted(model.runner, script))) as worker:
        told = await ask(client, prompt_tokens=PROMPT, max_tokens=9)
        assert told.last.code == ("VRAM_OOM" if isinstance(error, VramOom) else "INTERNAL")
        kept = 4 if isinstance(error, VramOom) else 0
        assert (await blocks(worker))["cached"] == kept
        assert cached(await ask(client, prompt_tokens=PROMPT, max_tokens=9)) == 16 * kept


async def test_what_is_reserved_for_a_job_that_never_runs_is_given_up(fake):
    client, gate, model = fake.client(), Gate(at=20), Model.echo()
    async with serving(fake, model.fresh(Scripted(model.runner, gate.script))) as worker:
        await ask(client, prompt_tokens=PROMPT, max_tokens=5)
        await client.submit(job_id="first", prompt_tokens=[1, 2], max_tokens=200, ignore_eos=True)
        await gate.until_reached()
        await client.submit(job_id="cancelled", prompt_tokens=PROMPT)
        assert await client.cancel("cancelled") == "cancelled"
        await client.submit(job_id="hurried", prompt_tokens=PROMPT, deadline_ms=1)
        gate.open()
        assert (await story(client, "hurried")).kinds == ["error"]
        assert (await blocks(worker))["cached"] == 6
