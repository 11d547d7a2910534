"""Prompt lookup as seen by jobs and operators: equal tokens, also after a takeover, and its counts."""

from __future__ import annotations

import pytest

from tests.jobs.harness import wait_until
from tests.service.jobs import PROMPT_TOKENS, crashed_attempt, reference_tokens
from tests.service.models import SharedModel
from tests.service.serving import http_get, read_job, run_job, serving
from worker.model import DraftSupport

FIELDS = {"prompt_tokens": PROMPT_TOKENS[:6] * 8, "max_tokens": 60, "ignore_eos": True, "logprobs": 2}
SAMPLINGS = (
    {"temperature": 0},
    {"temperature": 0.7, "seed": 3, "top_k": 3},
    {"temperature": 0.5, "seed": 5, "frequency_penalty": -1.5, "min_tokens": 20},
)


@pytest.fixture
def lookup(tiny):
    """A model with prompt lookup, whose draft tokens cost nothing."""
    model = SharedModel.from_file(tiny("qwen2"), speculation="ngram")
    model.runner.drafts = DraftSupport(0, dict.fromkeys((1, 2, 4, 8), 1.0), 0.0)
    return model


async def test_jobs_get_the_tokens_of_a_worker_without_prompt_lookup(fake, model, lookup):
    client = fake.client()
    async with serving(fake, lookup.fresh()) as worker:
        for sampling in SAMPLINGS:
            expected = reference_tokens(model(), **FIELDS, **sampling)
            assert (await run_job(client, **FIELDS, **sampling)).tokens == expected
            text = "".join(token.t for token in expected)
            stopped = {**FIELDS, **sampling, "stop": [text[len(text) // 2 :][:3]]}
            assert (await run_job(client, **stopped)).tokens == reference_tokens(model(), **stopped)
        proposed, accepted = worker.engine.draft_tokens
        assert proposed > accepted > 20

        async def shown():
            page = (await http_get(worker.service.http_port, "/metrics"))[1]
            lines = f"worker_draft_tokens {proposed}.0", f"worker_accepted_draft_tokens {accepted}.0"
            return all(line in page for line in lines)

        await wait_until(shown)


@pytest.mark.parametrize("published", [1, 17, 40])
async def test_a_job_is_continued_with_prompt_lookup(fake, model, lookup, published):
    fields = {**FIELDS, **SAMPLINGS[2]}
    whole = reference_tokens(model(), **fields)
    client = fake.client()
    await client.submit(job_id="a", **fields)
    await crashed_attempt(fake, model().fresh(), whole[:published])
    async with serving(fake, lookup.fresh(), name="w2"):
        result = await read_job(client, "a")
    assert result.tokens == whole
    assert "resumed" in result.kinds
