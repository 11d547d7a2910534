"""The orchestrator's client: submit, read and cancel jobs; inspect the queue and workers.

    client = Client.from_url("redis://localhost")
    job_id = await client.submit(prompt="Once upon a time", max_tokens=50)
    async for token in client.tokens(job_id):
        print(token.t, end="")

`SyncClient` has the same methods without `await`. Job fields are in `protocol.py`, events in
`events.py`; `reader.py` decides which events a reader has not received.
"""

from __future__ import annotations

import asyncio
import functools
import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import msgpack

from worker.errors import Cancelled, InvalidRequest, QueueFull
from worker.jobs.events import End, ErrorEvent, Event, Token, encode_event
from worker.jobs.keys import CONTROL, START, dead_key, events_key, queue_key, split_id, worker_events_key
from worker.jobs.payload import JOB_ID, JOB_ID_RULE, MAX_PAYLOAD_BYTES, job_id_of, read_map
from worker.jobs.protocol import Job, Trace
from worker.jobs.reader import Cursor, JobFailed, StreamEvent, decode_entry
from worker.jobs.streams import CancelCall, Disconnected, JobState, Record, Streams, retry_until_connected

P = ParamSpec("P")
T = TypeVar("T")

CANCELLED_TTL_MS = 7 * 24 * 3600 * 1000
"""Time to live of a job that was cancelled before it ran; settling its entry shortens it."""
MAX_COMMANDS = 10_000
"""Approximate number of entries kept on the control stream."""
READ_BLOCK_MS = 2000


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An entry of the dead-letter stream."""

    entry_id: str
    job_id: str
    reason: str
    attempts: int
    last_error: str
    payload: bytes

    @classmethod
    def of(cls, record: Record) -> DeadLetter:
        """Decode an entry of the dead-letter stream."""
        entry_id, fields = record
        names = ("job_id", "reason", "attempts", "last_error")
        job_id, reason, attempts, last_error = (fields.get(name, b"").decode(errors="replace") for name in names)
        return cls(entry_id, job_id, reason, int(attempts or 0), last_error, fields.get("p", b""))


@dataclass(frozen=True, slots=True)
class QueueEntry:
    """A job in the queue: waiting, or running if `worker` is set."""

    entry_id: str
    job_id: str | None
    """None if the payload has no readable id."""
    worker: str | None
    deliveries: int


class Client:
    """Client of one queue, for any number of jobs, within one event loop.

    Every method may raise `Disconnected`; reads retry for `reconnect_timeout_s` first.
    """

    def __init__(
        self,
        streams: Streams,
        queue: str = "default",
        bound: int = 10_000,
        retry_after_s: float = 1.0,
        reconnect_timeout_s: float = 30.0,
    ) -> None:
        self._streams = streams
        self._queue = queue
        self._bound = bound
        self._retry_after_s = retry_after_s
        self._reconnect_timeout_s = reconnect_timeout_s

    @classmethod
    def from_url(cls, url: str, queue: str = "default", bound: int = 10_000) -> Self:
        """Create a client of the Redis server at `url`; it connects on first use."""
        from worker.jobs.redis_streams import RedisStreams  # noqa: PLC0415  # imports redis only here

        return cls(RedisStreams.from_url(url), queue, bound)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._streams.close()

    async def submit(self, /, **fields: Any) -> str:
        """Enqueue a job with the fields of `protocol.Job`; return its id, generated if not given.

        Raises:
            InvalidRequest: with every wrong field, before anything is sent.
            QueueFull: the queue holds `bound` jobs, waiting and running; see `retry_after_s`.
        """
        fields = {"job_id": uuid.uuid4().hex} | {name: value for name, value in fields.items() if value is not None}
        job = Job.parse(fields)
        payload = msgpack.packb(fields)
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise InvalidRequest.of(("payload", f"at most {MAX_PAYLOAD_BYTES} bytes", len(payload)))
        if await self._streams.enqueue(self._queue, {"p": payload}, self._bound) is None:
            raise QueueFull(f"the queue {self._queue} holds {self._bound} jobs", self._retry_after_s)
        return job.job_id

    async def events(
        self, job_id: str, after: str = START, idle_s: float | None = None, next_i: int | None = None
    ) -> AsyncGenerator[StreamEvent, None]:
        """Yield the job's events above the id `after`, each once, up to the terminal one.

        Pass `next_i`, the index of the first token not received, when resuming: then no token is
        missing or repeated even if the server has lost the entry `after`.

        Raises:
            TimeoutError: no event for `idle_s` seconds. Without it, wait for as long as it takes.
        """
        block_ms = READ_BLOCK_MS if idle_s is None else min(READ_BLOCK_MS, int(idle_s * 1000))
        idle_since, cursor = time.monotonic(), Cursor(after, next_i)
        if after != START and await self._is_over(job_id, cursor, terminal_seen=True):
            return
        while True:
            records = await self._read(events_key(job_id), cursor.after, block_ms)
            for record in records:
                unseen, idle_since = cursor.advance(record), time.monotonic()
                if unseen is None:
                    break
                for item in unseen:
                    yield item
                    if isinstance(item.event, Event) and item.event.terminal:
                        return
            if records:
                continue
            position = cursor.after
            if await self._is_over(job_id, cursor):
                return
            if cursor.after == position and idle_s is not None and time.monotonic() - idle_since >= idle_s:
                raise TimeoutError(f"no event of job {job_id} for {idle_s} s")

    async def tokens(
        self, job_id: str, after: str = START, idle_s: float | None = None, next_i: int | None = None
    ) -> AsyncGenerator[Token, None]:
        """Yield the answer's tokens; arguments as of `events`. Raises JobFailed."""
        async for item in self.events(job_id, after, idle_s, next_i):
            if isinstance(item.event, Token):
                yield item.event
            elif isinstance(item.event, ErrorEvent):
                raise JobFailed(item.event)

    async def result(self, job_id: str, idle_s: float | None = None) -> tuple[str, End]:
        """Wait for the job; return the whole text and the `end` event. Raises JobFailed."""
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
        """Cancel a job.

        Returns `cancelled` (it ended as such), `requested` (its worker will stop) or `over` (it
        had ended otherwise). An unknown job is treated as waiting: if it is submitted later, it is
        over. Raises InvalidRequest for a malformed id.
        """
        if not JOB_ID.fullmatch(job_id):
            raise InvalidRequest.of(("job_id", JOB_ID_RULE, job_id[:128]))
        state, error, trace = JobState(), ErrorEvent.of(Cancelled("cancelled by request")), Trace.of(job_id, "")
        while True:
            envelope = trace.envelope(job_id, state.next_epoch, worker_id="")
            event = encode_event(error, envelope)
            call = CancelCall(state.last_id, envelope.epoch, event, envelope.ts_ms, CANCELLED_TTL_MS)
            outcome = await self._streams.cancel(job_id, call)
            if outcome == "REQUESTED":
                await self._command("cancel", job_id)
            if outcome != "RETRY":
                return outcome.lower()
            state = await self._streams.job_state(job_id)

    async def drain(self, worker: str) -> None:
        """Request that a worker takes no more jobs, finishes the running one, and stops."""
        await self._command("drain", worker)

    async def _command(self, do: str, target: str) -> None:
        await self._streams.add(CONTROL, {"do": do.encode(), "target": target.encode()}, MAX_COMMANDS, None)

    async def state(self, job_id: str) -> Mapping[str, str]:
        """The job's state hash; empty for an unknown job."""
        return (await self._streams.job_state(job_id)).fields

    async def queue(self, count: int = 100) -> list[QueueEntry]:
        """The first `count` jobs of the queue, waiting and running."""
        pending = {row.entry_id: row for row in await self._streams.pending(self._queue, count)}
        entries = []
        for entry_id, fields in await self._streams.range(queue_key(self._queue), "-", "+", count):
            row = pending.get(entry_id)
            worker, deliveries = (row.consumer, row.deliveries) if row else (None, 0)
            entries.append(QueueEntry(entry_id, job_id_of(fields.get("p", b"")), worker, deliveries))
        return entries

    async def workers(self) -> dict[str, Mapping[str, str]]:
        """The status of each live worker, by its id."""
        return await self._streams.workers()

    async def worker_events(self, worker: str, after: str = START) -> AsyncGenerator[StreamEvent, None]:
        """Yield a worker's own events above the id `after`. Never ends."""
        while True:
            for record in await self._read(worker_events_key(worker), after):
                for item in decode_entry(record, after):
                    yield item
                after = record[0]

    async def dead_letters(self, count: int = 100) -> list[DeadLetter]:
        """The oldest `count` dead letters."""
        return [DeadLetter.of(record) for record in await self._streams.range(dead_key(self._queue), "-", "+", count)]

    async def dead_letter(self, entry_id: str) -> DeadLetter | None:
        """The dead letter with that id."""
        records = await self._streams.range(dead_key(self._queue), entry_id, entry_id, 1)
        return DeadLetter.of(records[0]) if records else None

    async def retry_dead_letter(self, letter: DeadLetter) -> str:
        """Resubmit the job under a new id, `ID.r1`, then `ID.r2`, and delete the dead letter.

        Raises InvalidRequest and QueueFull as `submit` does.
        """
        fields, errors = read_map(letter.payload)
        if errors:
            raise InvalidRequest.of(*errors)
        job = {str(name): value for name, value in fields.items()} | {"job_id": retry_id(letter.job_id)}
        job_id = await self.submit(**job)
        await self.drop_dead_letter(letter.entry_id)
        return job_id

    async def drop_dead_letter(self, entry_id: str) -> bool:
        """Delete a dead letter."""
        return await self._streams.delete(dead_key(self._queue), entry_id)

    async def _is_over(self, job_id: str, cursor: Cursor, *, terminal_seen: bool = False) -> bool:
        """Whether no event will follow: the job ended at or below the cursor, or its keys expired.

        Rewinds the cursor if the server lost events that the reader received. A terminal event at
        or below the cursor counts as lost, unless `terminal_seen`.
        """
        state = await self._with_timeout(retry_until_connected(self._streams.job_state, job_id))
        ended, tokens = "ended_ms" in state.fields, int(state.fields.get("tokens") or 0)
        if split_id(state.last_id) > split_id(cursor.after):
            return False
        if not state.fields or cursor.after == START:
            return ended or cursor.after != START
        cut = split_id(state.last_id) < split_id(cursor.after)
        lost = cut or cursor.is_behind(tokens) or (ended and not terminal_seen)
        return not (lost and cursor.rewind()) and ended

    async def _read(self, key: str, after: str, block_ms: int = READ_BLOCK_MS) -> list[Record]:
        return await self._with_timeout(retry_until_connected(self._streams.read, key, after, block_ms))

    async def _with_timeout(self, reply: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self._reconnect_timeout_s):
                return await reply
        except TimeoutError:
            raise Disconnected(f"no reply from the server within {self._reconnect_timeout_s} s") from None


def retry_id(job_id: str) -> str:
    """The id under which a dead-lettered job is resubmitted."""
    match = re.fullmatch(r"(.*)\.r(\d+)", job_id)
    base, count = (match[1], int(match[2])) if match else (job_id, 0)
    suffix = f".r{count + 1}"
    return base[: 128 - len(suffix)] + suffix


def _sync(method: Callable[Concatenate[Client, P], Coroutine[Any, Any, T]]) -> Callable[Concatenate[SyncClient, P], T]:
    @functools.wraps(method)
    def call(self: SyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(method(self._client, *args, **kwargs))

    return call


def _sync_iterator(
    method: Callable[Concatenate[Client, P], AsyncGenerator[T, None]],
) -> Callable[Concatenate[SyncClient, P], Iterator[T]]:
    @functools.wraps(method)
    def call(self: SyncClient, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return self._iterate(method(self._client, *args, **kwargs))

    return call


class SyncClient:
    """`Client` without `await`, on an event loop of its own.

    For use from one thread, outside of any running event loop.

        with SyncClient.from_url("redis://localhost") as client:
            text, end = client.result(client.submit(prompt="Once upon a time"))
    """

    submit = _sync(Client.submit)
    events = _sync_iterator(Client.events)
    tokens = _sync_iterator(Client.tokens)
    result = _sync(Client.result)
    cancel = _sync(Client.cancel)
    drain = _sync(Client.drain)
    state = _sync(Client.state)
    queue = _sync(Client.queue)
    workers = _sync(Client.workers)
    worker_events = _sync_iterator(Client.worker_events)
    dead_letters = _sync(Client.dead_letters)
    dead_letter = _sync(Client.dead_letter)
    retry_dead_letter = _sync(Client.retry_dead_letter)
    drop_dead_letter = _sync(Client.drop_dead_letter)

    def __init__(self, client: Client) -> None:
        self._client = client
        self._runner = asyncio.Runner()
        self._open = True

    @classmethod
    def from_url(cls, url: str, queue: str = "default", bound: int = 10_000) -> Self:
        """Create a client of the Redis server at `url`; it connects on first use."""
        return cls(Client.from_url(url, queue, bound))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections and the event loop."""
        self._open = False
        self._run(self._client.close())
        self._runner.close()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        try:
            return self._runner.run(coroutine)
        except KeyboardInterrupt:
            # If it arrived as the coroutine ended, a pending stop would end the next run at once.
            loop = self._runner.get_loop()
            loop.call_soon(loop.stop)
            loop.run_forever()
            raise

    def _iterate(self, events: AsyncGenerator[T, None]) -> Iterator[T]:
        async def wait_for(reply: Awaitable[Any]) -> Any:
            return await reply

        try:
            while (item := self._run(wait_for(anext(events, None)))) is not None:
                yield item
        finally:
            if self._open:
                self._run(wait_for(events.aclose()))
