"""The judgement: every event stream replayed and held against an undisturbed run, and the server left tidy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from redis.asyncio import Redis

from tests.chaos.ledger import Job, Ledger
from tests.chaos.questions import POOLS
from tests.jobs.stream_checker import keys_without_ttl, violations
from worker.config import LeaseSection
from worker.jobs.events import End, ErrorEvent, Event, Resumed, Token, Tokens, decode_event
from worker.jobs.keys import dead_key, events_key, queue_key, state_key
from worker.jobs.streams import Record, Streams

ENDINGS = {
    "cancelled": {"end", "CANCELLED"},
    "hurried": {"end", "INFERENCE_TIMEOUT"},
    "poison": {"DEAD_LETTERED"},
    "invalid": {"INVALID_REQUEST"},
}
"""How a job of a kind may end; all others with `end`. Who was worn out by kills may be dead-lettered as well."""


def judged(job: Job, records: Sequence[Record]) -> list[str]:
    """What is wrong with one job; with one that the server has forgotten, only what its reader heard."""
    if not records and job.perhaps_lost and job.last is not None:
        return [f"{job.job_id}: {wrong}" for wrong in (*job.wrong, *_misheard(job))]
    found = violations(job.job_id, records) + [f"{job.job_id}: {wrong}" for wrong in (*job.wrong, *_misheard(job))]
    if found:
        return found
    events = [event for kind, packed in map(_fields, records) if (event := _event(kind, packed)) is not None]
    tokens = [token for event in events if isinstance(event, Tokens) for token in event.tokens]
    last, asked = events[-1], job.asked
    found += _compared(asked.ids, asked.texts, tokens, whole=isinstance(last, End))
    if isinstance(last, End) and (last.finish_reason, last.stop_sequence) != (asked.finish_reason, asked.stop_sequence):
        found.append(f"it ended by {last.finish_reason}, undisturbed by {asked.finish_reason}")
    ending = last.code if isinstance(last, ErrorEvent) else last.kind
    worn_out = ending == "DEAD_LETTERED" and barren_attempts(events) >= LeaseSection().max_attempts
    if not (worn_out or (ending != "DEAD_LETTERED" and ending in ENDINGS.get(job.kind, {"end"}))):
        found.append(f"a {job.kind} job ended with {ending}, after {barren_attempts(events)} attempts in vain")
    if any(isinstance(event, Resumed) and not event.exact for event in events):
        found.append("it was continued as by another model")
    return [f"{job.job_id}: {wrong}" for wrong in found]


def barren_attempts(events: Sequence[Event]) -> int:
    """How many attempts ended neither by a give-back nor with one new token, as the stream shows it."""
    barren, progress, running = 0, False, False
    for event in events:
        if isinstance(event, Tokens):
            progress = True
        elif event.kind in ("started", "resumed", "error"):
            given_back = isinstance(event, Resumed) and event.reason == "drain"
            barren += running and not progress and not given_back
            running, progress = True, False
    return barren


async def judge(streams: Streams, raw: Redis, ledger: Ledger) -> list[list[str]]:
    """What is wrong with each job, each unreadable payload and the server: an empty list where nothing is."""
    verdicts = []
    for job in ledger.jobs:
        records = await streams.range(events_key(job.job_id), "-", "+", 1_000_000)
        state = await raw.hgetall(state_key(job.job_id))
        untold = (
            [] if b"ended_ms" in state or not records else [f"{job.job_id}: its state does not say that it is over"]
        )
        verdicts.append(judged(job, records) + untold)
    for pool in POOLS:
        verdicts.append(await _queue(streams, raw, pool))
        verdicts.append(await _dead_letters(streams, raw, pool, ledger))
    ttls = {key.decode(): await raw.pttl(key) for key in await raw.keys("inf:*")}
    verdicts.append(keys_without_ttl({key: None if ttl == -1 else ttl for key, ttl in ttls.items()}))
    return verdicts


async def _queue(streams: Streams, raw: Redis, pool: str) -> list[str]:
    found = [f"{row.entry_id} of {pool} is pending for {row.consumer}" for row in await streams.pending(pool, 100)]
    left = await raw.xlen(queue_key(pool))
    return found + ([f"{left} entries are left in the queue {pool}"] if left else [])


async def _dead_letters(streams: Streams, raw: Redis, pool: str, ledger: Ledger) -> list[str]:
    """One for each dead-lettered job and each unreadable payload, and no other."""
    letters = [fields for _, fields in await streams.range(dead_key(pool), "-", "+", 100_000)]
    found_jobs = Counter(fields["job_id"].decode() for fields in letters if fields["job_id"])
    found_garbage = Counter(fields["p"] for fields in letters if not fields["job_id"])
    jobs: Counter[str] = Counter()
    for job in ledger.jobs:
        if job.pool == pool and await raw.hget(state_key(job.job_id), "error") == b"DEAD_LETTERED":
            jobs[job.job_id] = 1
    certain = Counter(g.payload for g in ledger.garbage if g.pool == pool and not g.perhaps_lost)
    possible = Counter(g.payload for g in ledger.garbage if g.pool == pool)
    wrong = [f"dead letter of {job_id}: {n} found" for job_id, n in found_jobs.items() if n != jobs[job_id]]
    wrong += [f"no dead letter of {job_id}" for job_id in jobs if job_id not in found_jobs]
    wrong += [f"dead letters that nobody sent: {n}" for n in [(found_garbage - possible).total()] if n]
    wrong += [f"unreadable payloads without a dead letter: {n}" for n in [(certain - found_garbage).total()] if n]
    return wrong


def _compared(ids: Sequence[int], texts: Sequence[str], tokens: Sequence[Token], whole: bool) -> list[str]:
    """The published tokens against the undisturbed ones: all of them, or those that a job's early end left."""
    count = len(ids) if whole else len(tokens)
    found = []
    if [token.id for token in tokens] != list(ids[:count]):
        found.append(f"its token ids are {[token.id for token in tokens]}, undisturbed {list(ids[:count])}")
    if [token.t for token in tokens] != list(texts[:count]):
        found.append(f"its text is {''.join(t.t for t in tokens)!r}, undisturbed {''.join(texts[:count])!r}")
    return found


def _misheard(job: Job) -> list[str]:
    """Tokens that the job's reader was given and an undisturbed run would not."""
    ids = job.asked.ids
    wrong = {i: token for i, token in job.heard.items() if i >= len(ids) or token != ids[i]}
    return [f"its reader heard {wrong}"] if wrong else []


def _fields(record: Record) -> tuple[str, bytes]:
    return record[1]["type"].decode(), record[1]["p"]


def _event(kind: str, packed: bytes) -> Event | None:
    decoded = decode_event(kind, packed)
    return decoded and decoded[0]
