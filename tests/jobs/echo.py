"""A worker without an engine: token i of every answer is a function of i."""

from __future__ import annotations

from worker.jobs.events import End, Event, Resumed, Started, Token, Tokens
from worker.jobs.lease import Claim, Closed, Lease
from worker.jobs.protocol import Limits, Trace, decode_job
from worker.jobs.reader import History
from worker.jobs.transport import Opening, Transport

LIMITS = Limits(model="echo", vocab_size=1000, context=4096)


def token(i: int) -> Token:
    return Token(i, 100 + i, f"w{i} ")


def tokens(first: int, end: int) -> Tokens:
    return Tokens(tokens=tuple(token(i) for i in range(first, end)))


def text(count: int) -> str:
    return "".join(token(i).t for i in range(count))


def end(count: int) -> End:
    return End(finish_reason="length", tokens_out=count, prompt_tokens=3, ttft_ms=1.0, decode_ms=2.0)


def opening(claim: Claim) -> Opening:
    resolved = decode_job(claim.payload).resolve(LIMITS, 3, claim.entry_id)

    def event(history: History) -> Event:
        if history.started is not None:
            return Resumed(from_i=len(history.tokens), reason=history.reason, exact=True)
        return Started(
            model=resolved.model,
            seed=resolved.seed,
            max_tokens=resolved.max_tokens,
            prompt_tokens=resolved.prompt_len,
            cached_tokens=0,
            started_at=0,
            enqueued_at=claim.enqueued_ms,
            prompt_hash="0" * 64,
            fingerprint="echo-1",
        )

    return event


async def begin(transport: Transport, claim: Claim) -> Lease | Closed:
    job = decode_job(claim.payload)
    trace = Trace.of(job.job_id, claim.entry_id, job, claim.traceparent)
    return await transport.take(claim, job.job_id, trace, opening(claim))


async def claim_next(transport: Transport) -> Claim:
    """Claim the next entry, which must be available."""
    claim = await transport.claim()
    assert claim is not None
    return claim


async def take_next(transport: Transport) -> Lease:
    """Claim the next entry and take its lease."""
    lease = await begin(transport, await claim_next(transport))
    assert isinstance(lease, Lease), lease
    return lease


async def complete(transport: Transport, lease: Lease, count: int) -> None:
    """Publish the rest of an answer of `count` tokens, and settle."""
    for i in range(lease.tokens, count):
        await transport.append(lease, tokens(i, i + 1))
    await transport.finish(lease, end(count))
    await transport.settle(lease)
