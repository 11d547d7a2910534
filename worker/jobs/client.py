"""The orchestrator's client: submit, read and cancel jobs; inspect the queue and workers.

    client = Client.from_url("redis://localhost")
    job_id = await client.submit(prompt="Once upon a time", max_tokens=50)
    async for token in client.tokens(job_id):
        print(token.t, end="")

`SyncClient` has the same methods without `await`. Job fields are in `protocol.py`, events in
`events.py`; `event_reader.py` reads them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import uuid
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from worker.errors import Cancelled, InvalidRequest, QueueFull, WorkerError
from worker.jobs.documents import Documents
from worker.jobs.event_reader import RECONNECT_TIMEOUT_S, EventReader, check_position
from worker.jobs.events import End, ErrorEvent, Token
from worker.jobs.keys import CONTROL, START, dead_key, events_key, is_entry_id, next_id, queue_key, worker_events_key
from worker.jobs.loop_thread import LoopThread
from worker.jobs.payload import encoding_of, job_id_of, pack, read_map
from worker.jobs.protocol import Job, Trace
from worker.jobs.queue_entries import DeadLetter, QueueEntry, retry_id
from worker.jobs.queues import Queues
from worker.jobs.reader import JobFailed, StreamEvent, decode_entry
from worker.jobs.streams import CancelCall, Disconnected, JobState, QueueDepth, Record, Streams, repeat_briefly

P = ParamSpec("P")
T = TypeVar("T")

CANCELLED_TTL_MS = 7 * 24 * 3600 * 1000
"""Time to live of a job that was cancelled before it ran; settling its entry shortens it."""
PUBLISHED_PAGE = 1000
MAX_COMMANDS = 10_000
"""Approximate number of entries kept on the control stream."""
POSITIONS = 1000
"""Entries of a queue that `position` searches."""
_UNREAD = JobState("0-1")
"""A state that no job has: `cancel` with it changes no waiting job."""


class Client:
    """Client of one queue, for any number of jobs, within one event loop.

    Every method may raise `Disconnected` and `ServerRefused`. Commands are repeated once after a
    lost connection and for 5 s while the server refuses them for now, reads for
    `reconnect_timeout_s`.
    """

    def __init__(
        self,
        streams: Streams,
        queue: str = "default",
        bound: int = 10_000,
        retry_after_s: float = 1.0,
        reconnect_timeout_s: float = RECONNECT_TIMEOUT_S,
    ) -> None:
        self._streams = streams
        self._queue = queue
        self._queues = Queues(streams, queue)
        self._bound = bound
        self._retry_after_s = retry_after_s
        self._reader = EventReader(streams, self._is_queued, reconnect_timeout_s)

    @classmethod
    def from_url(cls, url: str, queue: str = "default", bound: int = 10_000) -> Self:
        """Create a client of the Redis server at `url`; it connects on first use."""
        from worker.jobs.redis_streams import RedisStreams  # noqa: PLC0415  # imports redis only here

        return cls(RedisStreams.from_url(url), queue, bound)

    @staticmethod
    def new_id() -> str:
        """Return an unused job id, to pass to `submit` as `job_id` and to know before the call."""
        return uuid.uuid4().hex

    @property
    def documents(self) -> Documents:
        """What the gateway stores on the same server."""
        return self._streams.documents

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections. Readers that wait raise RuntimeError."""
        await self._reader.close()
        await self._streams.close()

    async def submit(self, /, **fields: Any) -> str:
        """Enqueue a job with the fields of `protocol.Job`; return its id, generated if not given.

        A job that names a `model` goes to a queue whose living workers serve it: this client's
        queue if it has one or if no living worker serves the model, else the one with most workers.
        The job carries its schema version in `v`, so that an older worker refuses it by that.

        Raises:
            InvalidRequest: with every wrong field, before anything is sent.
            QueueFull: the queue holds `bound` jobs, waiting and running; see `retry_after_s`.
            Disconnected: its `job_id` is the id; the job may have been enqueued. Submitting it
                again under that id runs it once.
        """
        fields = {"job_id": self.new_id()} | {name: value for name, value in fields.items() if value is not None}
        job = Job.parse(fields)
        if job.v > 1:
            fields["v"] = job.v
        try:
            queue = await self._queues.of_model(job.model)
            added = await self._enqueue(queue, job.job_id, pack(fields))
        except Disconnected as error:
            error.job_id = job.job_id
            raise
        except WorkerError as error:
            error.details["job_id"] = job.job_id
            raise
        if not added:
            raise QueueFull(f"the queue {queue} holds {self._bound} jobs", self._retry_after_s)
        return job.job_id

    async def _enqueue(self, queue: str, job_id: str, payload: bytes) -> bool:
        """Add the entry, a second time after a lost reply; `take` refuses one of two entries."""
        calls = 0

        async def enqueue() -> str | None:
            nonlocal calls
            calls += 1
            return await self._streams.enqueue(queue, {"p": payload}, self._bound)

        entry_id = await repeat_briefly(enqueue)
        if entry_id is not None:
            self._queues.submitted(job_id, queue, entry_id)
            return True
        return calls > 1 and await self._is_queued(job_id)  # the first entry may be what fills the queue

    async def events(
        self, job_id: str, after: str = START, idle_s: float | None = None, next_i: int | None = None
    ) -> AsyncGenerator[StreamEvent, None]:
        """Yield the job's events above the id `after`, each once, up to the terminal one.

        Pass `next_i`, the index of the first token not received, when resuming: then no token is
        missing or repeated even if the server has lost the entry `after`. A job without events,
        which may be waiting, expired or unknown, is waited for; see `is_known`.

        Raises:
            TimeoutError: no event for `idle_s` seconds. Without it, wait for as long as it takes.
            EventsLost: events that follow those received have expired or were deleted.
        """
        async for page in self.event_pages(job_id, after, idle_s, next_i):
            for item in page:
                yield item

    def event_pages(
        self, job_id: str, after: str = START, idle_s: float | None = None, next_i: int | None = None
    ) -> AsyncGenerator[list[StreamEvent], None]:
        """Yield the items of `events` in lists, as the server replied."""
        return self._reader.pages(job_id, after, idle_s, next_i)

    async def published(self, job_id: str) -> list[StreamEvent]:
        """The job's events so far; empty for a job that waits, has expired or is unknown."""
        check_position(job_id)
        items: list[StreamEvent] = []
        first = "-"
        while records := await self._range(events_key(job_id), first, "+", PUBLISHED_PAGE):
            for record in records:
                items += decode_entry(record, START)
            first = next_id(records[-1][0])
        return items

    async def forget(self, job_id: str, after_s: float) -> None:
        """Have an ended job's events expire after `after_s` seconds, unless they do before.

        Leave the worker the time to acknowledge the job after its terminal event: a job without
        events that is still in its queue begins again.
        """
        check_position(job_id)
        await repeat_briefly(self._streams.expire_job, job_id, int(after_s * 1000))

    async def tokens(
        self, job_id: str, after: str = START, idle_s: float | None = None, next_i: int | None = None
    ) -> AsyncGenerator[Token, None]:
        """Yield the answer's tokens; arguments and errors as of `events`. Raises JobFailed."""
        async for item in self.events(job_id, after, idle_s, next_i):
            if isinstance(token := _token_or_end(item), Token):
                yield token

    async def result(self, job_id: str, idle_s: float | None = None) -> tuple[str, End]:
        """Wait for the job; return the answer's text and the `end` event.

        The text is that of the channel final: no reasoning and no tool calls, which `tokens` has.

        Raises JobFailed, and the errors of `events`.
        """
        text: list[str] = []
        async for item in self.events(job_id, idle_s=idle_s):
            received = _token_or_end(item)
            if isinstance(received, End):
                return "".join(text), received
            if received is not None and received.channel == "final":
                text.append(received.t)
        raise AssertionError("events end with a terminal one")

    async def cancel(self, job_id: str) -> str:
        """Cancel a job.

        Returns `cancelled` (it ended as such), `requested` (its worker will stop), `over` (it had
        ended otherwise) or `unknown` (it is in no queue and has no events; nothing is recorded).
        Raises InvalidRequest for a malformed id.
        """
        check_position(job_id)
        state, error, trace = _UNREAD, ErrorEvent.of(Cancelled("cancelled by request")), Trace.of(job_id, "")
        while True:
            envelope = trace.envelope(job_id, state.next_epoch, worker_id="")
            event = trace.encode(error, envelope)
            call = CancelCall(state.last_id, envelope.epoch, event, envelope.ts_ms, CANCELLED_TTL_MS)
            outcome = await repeat_briefly(self._streams.cancel, job_id, call)
            if outcome == "REQUESTED":
                await self._command("cancel", job_id)
            if outcome != "RETRY":
                return outcome.lower()
            state = await repeat_briefly(self._streams.job_state, job_id)
            if (entry := await self._queues.find(job_id)) is not None:
                trace = Trace.of(job_id, entry[0], encoding=encoding_of(entry[1].get("p", b"")))
            elif not state.fields and not await self.state(job_id):
                return "unknown"

    async def is_known(self, job_id: str) -> bool:
        """Whether the job waits in a queue, runs, or has ended and not expired."""
        check_position(job_id)
        known = bool(await self.state(job_id)) or await self._is_queued(job_id)
        return known or bool(await self.state(job_id))  # it may have left the queue during the search

    async def _is_queued(self, job_id: str) -> bool:
        return await self._queues.find(job_id) is not None

    async def drain(self, worker: str) -> None:
        """Request that a worker takes no more jobs, finishes the running one, and stops."""
        await self._command("drain", worker)

    async def _command(self, do: str, target: str) -> None:
        fields = {"do": do.encode(), "target": target.encode()}
        await repeat_briefly(self._streams.add, CONTROL, fields, MAX_COMMANDS, None)

    async def state(self, job_id: str) -> Mapping[str, str]:
        """The job's state hash; empty for an unknown job."""
        return (await repeat_briefly(self._streams.job_state, job_id)).fields

    @property
    def queue_name(self) -> str:
        """Name of this client's queue."""
        return self._queue

    async def queue(self, count: int = 100) -> list[QueueEntry]:
        """The first `count` jobs of the queue, waiting and running."""
        rows = await repeat_briefly(self._streams.pending, self._queue, count)
        holders = {row.entry_id: (row.consumer, row.deliveries, row.idle_ms) for row in rows}
        records = await self._range(queue_key(self._queue), "-", "+", count)
        return [
            QueueEntry(i, job_id_of(fields.get("p", b"")), *holders.get(i, (None, 0, None))) for i, fields in records
        ]

    async def queue_length(self, queue: str | None = None) -> int:
        """Number of jobs in a queue, by default this client's, waiting and running."""
        return await repeat_briefly(self._streams.length, queue_key(queue or self._queue))

    async def queue_depth(self, queue: str | None = None, lease_s: float = 4.0) -> QueueDepth:
        """Jobs of a queue, by default this client's; `lease_s` is the setting of its workers."""
        return await repeat_briefly(self._streams.depth, queue or self._queue, int(lease_s * 1000))

    async def position(self, correlation_id: str, model: str | None = None) -> tuple[int, int] | None:
        """Place of a waiting job among the waiting jobs of its queue, from 1, and their number.

        The job is the first one with that correlation id in the queue that serves `model`. None if
        it does not wait there, or not among the first POSITIONS jobs.
        """
        queue = await self._queues.of_model(model)
        return await repeat_briefly(self._streams.position, queue, correlation_id, POSITIONS)

    async def unclaimed(self, model: str | None = None) -> int:
        """Number of jobs that no worker has claimed, in the queue for jobs of the model."""
        queue = await self._queues.of_model(model)
        length = await repeat_briefly(self._streams.length, queue_key(queue))
        claimed = len(await repeat_briefly(self._streams.pending, queue, length)) if length else 0
        return max(0, length - claimed)

    async def workers(self) -> dict[str, Mapping[str, str]]:
        """The status of each live worker, by its id."""
        return await repeat_briefly(self._streams.workers)

    async def write_refusal(self) -> Disconnected | None:
        """Why the server refuses writes for now, such as a memory limit; None if it does not."""
        try:
            await self._streams.check_writes()
        except Disconnected as error:
            if not error.reply:
                raise
            return error
        return None

    async def server_time_ms(self) -> int:
        """The server's clock, ms since 1970. Reads no key: it succeeds if the server replies."""
        return await repeat_briefly(self._streams.time_ms)

    async def worker_events(self, worker: str, after: str = START) -> AsyncGenerator[StreamEvent, None]:
        """Yield a worker's own events above the id `after`. Never ends."""
        while True:
            for record in await self._reader.read(worker_events_key(worker), after):
                for item in decode_entry(record, after):
                    yield item
                after = record[0]

    async def dead_letters(self, count: int = 100, after: str = START) -> list[DeadLetter]:
        """The oldest `count` dead letters above the id `after`."""
        records = await self._range(dead_key(self._queue), next_id(after), "+", count)
        return [DeadLetter.of(record) for record in records]

    async def dead_letter_count(self, queue: str | None = None) -> int:
        """Number of dead letters of a queue, by default this client's."""
        return await repeat_briefly(self._streams.length, dead_key(queue or self._queue))

    async def dead_letter(self, entry_id: str) -> DeadLetter | None:
        """The dead letter with that id."""
        if not is_entry_id(entry_id):
            return None
        records = await self._range(dead_key(self._queue), entry_id, entry_id, 1)
        return DeadLetter.of(records[0]) if records else None

    async def retry_dead_letter(self, letter: DeadLetter) -> str:
        """Resubmit the job under a new id, `ID.r1`, then `ID.r2`, and delete the dead letter.

        A payload without a readable id gets a random one, as in `submit`.

        Raises InvalidRequest and QueueFull as `submit` does.
        """
        fields, errors = read_map(letter.payload)
        if errors:
            raise InvalidRequest.of(*errors)
        job_id = retry_id(letter.job_id) if letter.job_id else self.new_id()
        job = {str(name): value for name, value in fields.items()} | {"job_id": job_id}
        await self.submit(**job)
        await self.drop_dead_letter(letter.entry_id)
        return job_id

    async def drop_dead_letter(self, entry_id: str) -> bool:
        """Delete a dead letter. False: there is none, or a call whose reply was lost deleted it."""
        return is_entry_id(entry_id) and await repeat_briefly(self._streams.delete, dead_key(self._queue), entry_id)

    async def _range(self, key: str, first: str, last: str, count: int) -> list[Record]:
        return await repeat_briefly(self._streams.range, key, first, last, count)


def _token_or_end(item: StreamEvent) -> Token | End | None:
    """The item's token or end, None for other events. Raises JobFailed for an error."""
    if isinstance(item.event, ErrorEvent):
        raise JobFailed(item.event)
    return item.event if isinstance(item.event, Token | End) else None


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
    """`Client` without `await`, for any number of threads; its event loop has a thread of its own.

    It cannot be used in a process that was forked after its first call.

        with SyncClient.from_url("redis://localhost") as client:
            text, end = client.result(client.submit(prompt="Once upon a time"))
    """

    new_id = staticmethod(Client.new_id)
    submit = _sync(Client.submit)
    result = _sync(Client.result)
    cancel = _sync(Client.cancel)
    is_known = _sync(Client.is_known)
    drain = _sync(Client.drain)
    state = _sync(Client.state)
    queue = _sync(Client.queue)
    queue_length = _sync(Client.queue_length)
    queue_depth = _sync(Client.queue_depth)
    position = _sync(Client.position)
    workers = _sync(Client.workers)
    server_time_ms = _sync(Client.server_time_ms)
    worker_events = _sync_iterator(Client.worker_events)
    dead_letters = _sync(Client.dead_letters)
    dead_letter_count = _sync(Client.dead_letter_count)
    dead_letter = _sync(Client.dead_letter)
    retry_dead_letter = _sync(Client.retry_dead_letter)
    drop_dead_letter = _sync(Client.drop_dead_letter)

    def __init__(self, client: Client) -> None:
        self._client = client
        self._thread = LoopThread()
        self._closing = weakref.finalize(self, _close, self._thread, client)

    @classmethod
    def from_url(cls, url: str, queue: str = "default", bound: int = 10_000) -> Self:
        """Create a client of the Redis server at `url`; it connects on first use."""
        return cls(Client.from_url(url, queue, bound))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections and end the thread. Calls in other threads raise RuntimeError."""
        self._closing()

    def events(
        self, job_id: str, after: str = START, idle_s: float | None = None, next_i: int | None = None
    ) -> Iterator[StreamEvent]:
        """As `Client.events`."""
        for page in self._iterate(self._client.event_pages(job_id, after, idle_s, next_i)):
            yield from page

    def tokens(
        self, job_id: str, after: str = START, idle_s: float | None = None, next_i: int | None = None
    ) -> Iterator[Token]:
        """As `Client.tokens`."""
        for item in self.events(job_id, after, idle_s, next_i):
            if isinstance(token := _token_or_end(item), Token):
                yield token

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._thread.run(coroutine)

    def _iterate(self, items: AsyncGenerator[T, None]) -> Iterator[T]:
        async def next_item() -> T | None:
            return await anext(items, None)

        try:
            while (item := self._run(next_item())) is not None:
                yield item
        finally:
            with contextlib.suppress(RuntimeError):  # closed
                self._thread.start(_end(items))


async def _end(items: AsyncGenerator[Any, None]) -> None:
    """Close the generator, after an interrupted read of it has ended."""
    for _ in range(100):
        try:
            return await items.aclose()
        except RuntimeError:
            await asyncio.sleep(0.01)


def _close(thread: LoopThread, client: Client) -> None:
    thread.close(client.close())
