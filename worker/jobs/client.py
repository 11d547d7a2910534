"""What an orchestrator uses: submit a job, read its events as they come, resume at an id, cancel; and dead letters.

    client = Client.from_url("redis://localhost")
    job_id = await client.submit(prompt="Once upon a time", max_tokens=50)
    async for token in client.tokens(job_id):
        print(token.t, end="")

`sync_client.py` is the same without `await`. What travels is `protocol.py`'s and `events.py`'s; nothing here knows a
worker or an engine.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import msgpack

from worker.errors import Cancelled, InvalidRequest, QueueFull
from worker.jobs.events import End, Envelope, ErrorEvent, Event, Token, encode_event
from worker.jobs.keys import CONTROL, START, dead_key, events_key, order_of, queue_key, worker_events_key
from worker.jobs.payload import JOB_ID, job_id_of, read_map
from worker.jobs.protocol import MAX_PAYLOAD_BYTES, Job, Trace
from worker.jobs.received import Bookmark, JobFailed, Received, received
from worker.jobs.redis_streams import RedisStreams
from worker.jobs.streams import CancelCall, Disconnected, JobState, Record, Streams, Written, retry_until_connected

T = TypeVar("T")

RETENTION_MS = 7 * 24 * 3600 * 1000
"""Of a job that was cancelled before anybody ran it; settling its entry shortens that."""
CONTROL_LINES = 10_000
READ_BLOCK_MS = 2000


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An entry that was given up."""

    entry_id: str
    job_id: str
    reason: str
    attempts: int
    last_error: str
    payload: bytes

    @classmethod
    def of(cls, record: Record) -> DeadLetter:
        """From an entry of the dead-letter stream."""
        entry_id, fields = record
        words = {name: value.decode(errors="replace") for name, value in fields.items() if name != "p"}
        job_id, reason, last_error = (words.get(name, "") for name in ("job_id", "reason", "last_error"))
        attempts = words.get("attempts", "0")
        return cls(entry_id, job_id, reason, int(attempts), last_error, fields.get("p", b""))


@dataclass(frozen=True, slots=True)
class QueueEntry:
    """A job in the queue: waiting, or held by a worker."""

    entry_id: str
    job_id: str | None
    """None where the payload names none."""
    worker: str | None
    deliveries: int


class Client:
    """One queue of one server, for any number of jobs. Not for use by several event loops.

    Every method may raise `Disconnected`; reading rides out an outage of `patience_s`.
    """

    def __init__(
        self,
        streams: Streams,
        queue: str = "default",
        bound: int = 10_000,
        retry_after_s: float = 1.0,
        patience_s: float = 30.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._streams = streams
        self._queue = queue
        self._bound = bound
        self._retry_after_s = retry_after_s
        self._patience_s = patience_s
        self._clock = clock

    @classmethod
    def from_url(cls, url: str, queue: str = "default", bound: int = 10_000) -> Self:
        """A client of the Redis server at `url`; it connects when first used."""
        return cls(RedisStreams.from_url(url), queue, bound)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._streams.close()

    async def submit(self, **fields: Any) -> str:
        """Enqueue a job of these fields (see `protocol.Job`); its id, made up where `job_id` is not given.

        Raises:
            InvalidRequest: with every wrong field, before anything is sent.
            QueueFull: the queue holds `bound` jobs, waiting and running; try again after `retry_after_s`.
        """
        given = {"job_id": uuid.uuid4().hex} | {name: value for name, value in fields.items() if value is not None}
        job = Job.parse(given)
        payload = msgpack.packb(given)
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise InvalidRequest.of(("payload", f"at most {MAX_PAYLOAD_BYTES} bytes", len(payload)))
        if await self._streams.enqueue(self._queue, {"p": payload}, self._bound) is None:
            raise QueueFull(f"the queue {self._queue} holds {self._bound} jobs", self._retry_after_s)
        return job.job_id

    async def events(
        self, job_id: str, after: str = START, idle_s: float | None = None, next_i: int | None = None
    ) -> AsyncIterator[Received]:
        """The job's events above the id `after`, each once and as it comes, to the terminal one.

        Who goes on at an id may say which token it lacks first, `next_i`: then nothing is missed and no token repeated,
        even if the server has forgotten that entry since. Raises TimeoutError where no event comes for `idle_s`;
        without it, waits for a job that nobody has begun.
        """
        block_ms = READ_BLOCK_MS if idle_s is None else min(READ_BLOCK_MS, int(idle_s * 1000))
        quiet_since, mark = time.monotonic(), Bookmark(after, next_i)
        if after != START and await self._is_over(job_id, mark, told=True):
            return
        while True:
            records = await self._read(events_key(job_id), mark.after, block_ms)
            for record in records:
                news, quiet_since = mark.news(record), time.monotonic()
                if news is None:
                    break
                for item in news:
                    yield item
                    if isinstance(item.event, Event) and item.event.terminal:
                        return
            if records:
                continue
            place = mark.after
            if await self._is_over(job_id, mark):
                return
            if mark.after == place and idle_s is not None and time.monotonic() - quiet_since >= idle_s:
                raise TimeoutError(f"no event of job {job_id} for {idle_s} s")

    async def tokens(
        self, job_id: str, after: str = START, idle_s: float | None = None, next_i: int | None = None
    ) -> AsyncIterator[Token]:
        """The answer's tokens alone. Raises JobFailed where the job ends with an error."""
        async for item in self.events(job_id, after, idle_s, next_i):
            if isinstance(item.event, Token):
                yield item.event
            elif isinstance(item.event, ErrorEvent):
                raise JobFailed(item.event)

    async def result(self, job_id: str, idle_s: float | None = None) -> tuple[str, End]:
        """The whole text and the `end` event. Raises JobFailed where the job ends with an error."""
        text: list[str] = []
        async for item in self.events(job_id, idle_s=idle_s):
            if isinstance(item.event, Token):
                text.append(item.event.t)
            elif isinstance(item.event, ErrorEvent):
                raise JobFailed(item.event)
            elif isinstance(item.event, End):
                return "".join(text), item.event
        raise TimeoutError(f"the events of job {job_id} have expired")

    async def cancel(self, job_id: str) -> str:
        """`cancelled`: it is over as such. `requested`: its worker will stop. `over`: it had ended otherwise.

        A job that nobody has heard of counts as waiting: should it come, it is over. Raises InvalidRequest for an id
        that no job can have.
        """
        if not JOB_ID.fullmatch(job_id):
            raise InvalidRequest.of(("job_id", "1 to 128 of letters, digits, - _ . :", job_id[:128]))
        state, error, trace = JobState(), ErrorEvent.of(Cancelled("cancelled by request")), Trace.of(job_id, "")
        while True:
            now_ms, epoch = int(self._clock() * 1000), state.next_epoch
            envelope = Envelope(
                job_id=job_id,
                epoch=epoch,
                ts_ms=now_ms,
                worker_id="",
                correlation_id=trace.correlation_id,
                traceparent=trace.traceparent,
            )
            event = Written(*encode_event(error, envelope))
            outcome = await self._streams.cancel(job_id, CancelCall(state.top, epoch, event, now_ms, RETENTION_MS))
            if outcome == "REQUESTED":
                await self._command("cancel", job_id)
            if outcome != "RETRY":
                return outcome.lower()
            state = await self._streams.job_state(job_id)

    async def drain(self, worker: str) -> None:
        """Ask a worker to take no more jobs, finish, and stop."""
        await self._command("drain", worker)

    async def _command(self, do: str, target: str) -> None:
        await self._streams.add(CONTROL, {"do": do.encode(), "target": target.encode()}, CONTROL_LINES, None)

    async def state(self, job_id: str) -> Mapping[str, str]:
        """The job's state hash; empty for an unknown job."""
        return (await self._streams.job_state(job_id)).fields

    async def queue(self, count: int = 100) -> list[QueueEntry]:
        """The queue's first entries, waiting and running."""
        held = {pending.entry_id: pending for pending in await self._streams.pending(self._queue, count)}
        entries = []
        for entry_id, fields in await self._streams.range(queue_key(self._queue), "-", "+", count):
            holder = held.get(entry_id)
            worker, deliveries = (holder.consumer, holder.deliveries) if holder else (None, 0)
            entries.append(QueueEntry(entry_id, job_id_of(fields.get("p", b"")), worker, deliveries))
        return entries

    async def workers(self) -> dict[str, Mapping[str, str]]:
        """The status of each living worker."""
        return await self._streams.workers()

    async def worker_events(self, worker: str, after: str = START) -> AsyncIterator[Received]:
        """A worker's own events above the id `after`, for ever."""
        while True:
            for record in await self._read(worker_events_key(worker), after):
                for item in received(record, after):
                    yield item
                after = record[0]

    async def dead_letters(self, count: int = 100) -> list[DeadLetter]:
        """The oldest dead letters."""
        return [DeadLetter.of(record) for record in await self._streams.range(dead_key(self._queue), "-", "+", count)]

    async def dead_letter(self, entry_id: str) -> DeadLetter | None:
        """The dead letter of that id."""
        found = await self._streams.range(dead_key(self._queue), entry_id, entry_id, 1)
        return DeadLetter.of(found[0]) if found else None

    async def retry_dead_letter(self, letter: DeadLetter) -> str:
        """Submit the job again under a new id, `ID.r1`, then `ID.r2`; the dead letter goes. Raises as `submit` does."""
        fields, faults = read_map(letter.payload, MAX_PAYLOAD_BYTES)
        if faults:
            raise InvalidRequest.of(*faults)
        again = {str(name): value for name, value in fields.items()} | {"job_id": retried(letter.job_id)}
        job_id = await self.submit(**again)
        await self.drop_dead_letter(letter.entry_id)
        return job_id

    async def drop_dead_letter(self, entry_id: str) -> bool:
        """Delete a dead letter."""
        return await self._streams.delete(dead_key(self._queue), entry_id)

    async def _is_over(self, job_id: str, mark: Bookmark, *, told: bool = False) -> bool:
        """Whether no more is to come: the terminal event is not above `mark`, or it went with the job's keys.

        Where the server forgot what the reader has heard, it goes back; also for a terminal event, unless `told` of it.
        """
        state = await self._patiently(retry_until_connected(self._streams.job_state, job_id))
        ended, tokens = "ended_ms" in state.fields, int(state.fields.get("tokens") or 0)
        if order_of(state.top) > order_of(mark.after):
            return False
        if not state.fields or mark.after == START:
            return ended or mark.after != START
        forgot = order_of(state.top) < order_of(mark.after) or mark.lacks(tokens) or (ended and not told)
        return not (forgot and mark.begin_again()) and ended

    async def _read(self, key: str, after: str, block_ms: int = READ_BLOCK_MS) -> list[Record]:
        return await self._patiently(retry_until_connected(self._streams.read, key, after, block_ms))

    async def _patiently(self, asked: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self._patience_s):
                return await asked
        except TimeoutError:
            raise Disconnected(f"the server did not answer within {self._patience_s} s") from None


def retried(job_id: str) -> str:
    """The id under which a job is tried again."""
    match = re.fullmatch(r"(.*)\.r(\d+)", job_id)
    base, count = (match[1], int(match[2])) if match else (job_id, 0)
    suffix = f".r{count + 1}"
    return base[: 128 - len(suffix)] + suffix
