"""Check of a run: event streams against their reference answers, and what is left on the server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from redis.asyncio import Redis

from tests.chaos.run_log import Job, RunLog
from tests.chaos.workload import QUEUES
from tests.jobs.stream_checker import keys_without_ttl, violations
from worker.config import LeaseSection
from worker.jobs.events import End, ErrorEvent, Event, Resumed, Token, Tokens, decode_event
from worker.jobs.keys import dead_key, events_key, queue_key, state_key
from worker.jobs.streams import Record, Streams
from worker.jobs.transport import ENTRY_DELETED

ENDINGS = {
    "cancelled": {"end", "CANCELLED"},
    "deadline": {"end", "INFERENCE_TIMEOUT"},
    "poison": {"DEAD_LETTERED"},
    "invalid": {"INVALID_REQUEST"},
}
"""Allowed endings by kind of job, by default `end`; killed jobs may be dead-lettered as well."""


def check_job(job: Job, records: Sequence[Record], one_release: bool = True) -> list[str]:
    """Violations of one job. If the server lost the job, only its reader's events are checked.

    Workers of two releases may have different numerics: `exact` may be false then.
    """
    found = [f"{job.job_id}: {problem}" for problem in (*job.problems, *_unexpected_tokens(job))]
    if not records and job.maybe_lost and job.last is not None:
        return found
    found = violations(job.job_id, records) + found
    if found:
        return found
    events = [event for kind, packed in map(_fields, records) if (event := _event(kind, packed)) is not None]
    tokens = [token for event in events if isinstance(event, Tokens) for token in event.tokens]
    last, case = events[-1], job.case
    found += _compare(case.ids, case.texts, tokens, whole=isinstance(last, End))
    if isinstance(last, End) and (last.finish_reason, last.stop_sequence) != (case.finish_reason, case.stop_sequence):
        found.append(f"it ended by {last.finish_reason}, expected {case.finish_reason}")
    ending = last.code if isinstance(last, ErrorEvent) else last.kind
    if job.maybe_lost and isinstance(last, ErrorEvent) and last.message == ENTRY_DELETED:
        return found  # the server has lost the entry, and a worker had received it
    poisoned = ending == "DEAD_LETTERED" and barren_attempts(events) >= LeaseSection().max_attempts
    if not (poisoned or (ending != "DEAD_LETTERED" and ending in ENDINGS.get(job.kind, {"end"}))):
        found.append(f"a {job.kind} job ended with {ending}, after {barren_attempts(events)} attempts without progress")
    if one_release and any(isinstance(event, Resumed) and not event.exact for event in events):
        found.append("it was continued with exact = false")
    return [f"{job.job_id}: {problem}" for problem in found]


def barren_attempts(events: Sequence[Event]) -> int:
    """Number of attempts that ended without a release and without a new token."""
    barren, progress, running = 0, False, False
    for event in events:
        if isinstance(event, Tokens):
            progress = True
        elif event.kind in ("started", "resumed", "error"):
            given_back = isinstance(event, Resumed) and event.reason == "drain"
            barren += running and not progress and not given_back
            running, progress = True, False
    return barren


async def check_run(streams: Streams, raw: Redis, run_log: RunLog, one_release: bool = True) -> list[list[str]]:
    """Violations, one list for each job and queue and for the server's keys."""
    findings = []
    for job in run_log.jobs:
        records = await streams.range(events_key(job.job_id), "-", "+", 1_000_000)
        state = await raw.hgetall(state_key(job.job_id))
        ended = b"ended_ms" in state or not records
        findings.append(
            check_job(job, records, one_release) + ([] if ended else [f"{job.job_id}: its state has no ended_ms"])
        )
    for queue in QUEUES:
        findings.append(await _queue(streams, raw, queue))
        findings.append(await _dead_letters(streams, raw, queue, run_log))
    ttls = {key.decode(): await raw.pttl(key) for key in await raw.keys("inf:*")}
    findings.append(run_log.problems)
    findings.append(keys_without_ttl({key: None if ttl == -1 else ttl for key, ttl in ttls.items()}))
    return findings


async def _queue(streams: Streams, raw: Redis, queue: str) -> list[str]:
    found = [f"{row.entry_id} of {queue} is pending for {row.consumer}" for row in await streams.pending(queue, 100)]
    left = await raw.xlen(queue_key(queue))
    return found + ([f"{left} entries are left in the queue {queue}"] if left else [])


async def _dead_letters(streams: Streams, raw: Redis, queue: str, run_log: RunLog) -> list[str]:
    """Check that each dead-lettered job and each unreadable payload has exactly one dead letter."""
    letters = [fields for _, fields in await streams.range(dead_key(queue), "-", "+", 100_000)]
    found_jobs = Counter(fields["job_id"].decode() for fields in letters if fields["job_id"])
    found_garbage = Counter(fields["p"] for fields in letters if not fields["job_id"])
    jobs: Counter[str] = Counter()
    for job in run_log.jobs:
        if job.queue == queue and await raw.hget(state_key(job.job_id), "error") == b"DEAD_LETTERED":
            jobs[job.job_id] = 1
    certain = Counter(g.payload for g in run_log.garbage if g.queue == queue and not g.maybe_lost)
    possible: Counter[bytes] = Counter()  # short payloads may be alike
    for garbage in run_log.garbage:
        possible[garbage.payload] += garbage.entries * (garbage.queue == queue)
    wrong = [f"dead letter of {job_id}: {n} found" for job_id, n in found_jobs.items() if n != jobs[job_id]]
    wrong += [f"no dead letter of {job_id}" for job_id in jobs if job_id not in found_jobs]
    wrong += [f"dead letters of unknown payloads: {n}" for n in [(found_garbage - possible).total()] if n]
    wrong += [f"unreadable payloads without a dead letter: {n}" for n in [(certain - found_garbage).total()] if n]
    return wrong


def _compare(ids: Sequence[int], texts: Sequence[str], tokens: Sequence[Token], whole: bool) -> list[str]:
    """Compare published tokens with the reference: all of them, or the first ones."""
    count = len(ids) if whole else len(tokens)
    found = []
    if [token.id for token in tokens] != list(ids[:count]):
        found.append(f"its token ids are {[token.id for token in tokens]}, expected {list(ids[:count])}")
    if [token.t for token in tokens] != list(texts[:count]):
        found.append(f"its text is {''.join(t.t for t in tokens)!r}, expected {''.join(texts[:count])!r}")
    return found


def _unexpected_tokens(job: Job) -> list[str]:
    """Tokens that the job's reader received and that are not in the reference."""
    ids = job.case.ids
    wrong = {i: token for i, token in job.received.items() if i >= len(ids) or token != ids[i]}
    return [f"its reader received {wrong}"] if wrong else []


def _fields(record: Record) -> tuple[str, bytes]:
    return record[1]["type"].decode(), record[1]["p"]


def _event(kind: str, packed: bytes) -> Event | None:
    decoded = decode_event(kind, packed)
    return decoded and decoded[0]
