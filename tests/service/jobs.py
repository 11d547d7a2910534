"""Jobs for tests, their reference tokens, and earlier attempts at them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from tests.jobs.echo import claim_next
from tests.jobs.harness import Harness
from tests.service.models import SharedModel
from worker.answer import Answer, job_grammar, tokenize_job
from worker.config import LeaseSection
from worker.jobs.events import Event, Started, Token, Tokens
from worker.jobs.lease import Lease
from worker.jobs.protocol import Job, Trace, decode_job
from worker.jobs.transport import Transport
from worker.runtime import LoadedModel
from worker.service.prepared_job import PreparedJob

SAMPLED_JOB = {
    "prompt": "hello world",
    "seed": 7,
    "temperature": 0.8,
    "max_tokens": 12,
    "ignore_eos": True,
    "logprobs": 2,
}
PROMPT_TOKENS = [n % 90 for n in range(100)]
"""Six full KV blocks and four tokens more."""
NOW = datetime(2026, 3, 1, tzinfo=UTC)


def reference_tokens(model: SharedModel, **fields: Any) -> list[Token]:
    """The tokens of a job, drawn without a service; a worker may serve `model` meanwhile."""
    loaded = model.reference.fresh()
    job = Job.parse({"job_id": "j", **fields})
    prompt, resolved = tokenize_job(job, loaded, NOW, "1-1")
    answer = Answer(job, resolved, loaded.tokenizer, prompt, grammar=job_grammar(job, loaded.tokenizer, prompt))
    loaded.engine.add(answer.sequence)
    tokens = []
    while answer.finish_reason is None:
        tokens += [token for drawn in loaded.engine.step() if (token := answer.push(drawn))]
    return tokens


async def crashed_attempt(
    harness: Harness,
    model: LoadedModel,
    tokens: list[Token],
    *,
    started: Callable[[Started], Event] = lambda event: event,
) -> Lease:
    """An attempt at job `a` that published these tokens and crashed; its lease has expired.

    `started` may change the stream's first event.
    """
    transport = Transport(harness.connect(), "first", lease=LeaseSection(lease_s=60, scan_s=0.02))
    await transport.open()
    claim = await claim_next(transport)
    job = decode_job(claim.payload)
    prepared = PreparedJob.of(job, model, claim.entry_id, claim.enqueued_ms)
    trace = Trace.of(job.job_id, claim.entry_id, job, claim.traceparent)
    lease = await transport.take(
        claim, job.job_id, trace, lambda history: started(prepared.opening(model, history, 1, 0))
    )
    assert isinstance(lease, Lease)
    if tokens:
        await transport.append(lease, Tokens(tokens=tuple(tokens)))
    await harness.connect().give_back("default", "first", claim.entry_id, 60_000, 1)
    return lease


async def handed_back_attempt(harness: Harness, model: LoadedModel, tokens: list[Token]) -> None:
    """As after a drain: the next delivery counts as the first one, and the job has a history."""
    lease = await crashed_attempt(harness, model, tokens)
    await harness.connect().give_back("default", "first", lease.claim.entry_id, 60_000, 0)
