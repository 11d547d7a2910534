"""The jobs of one request: ids, submission, events from the first on, cancellation.

A job's id is the id of the API's object, so any gateway process finds the job of a response:

| request | id | when its client disconnects |
| --- | --- | --- |
| no header | 16 random digits, 16 of a digest | the job is cancelled |
| `Idempotency-Key` | 16 digits of a digest of tenant and key, 16 of a digest | the job goes on |
| `Last-Event-ID` | in the header | cancelled, unless the request has the key too |

The second digest is of tenant, first digits and job fields, so a request that resumes a stream has
the same tenant and the same fields as the one that began it.

A request with a known id attaches to the job's stream and reads it from the start: the translation
of events is a function of the stream, so the caller leaves out what the client has received.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import re
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from worker.errors import WorkerError
from worker.gateway.context import Call, GatewayContext
from worker.gateway.errors import ApiError, deadline_passed, error_of_event, invalid
from worker.jobs.events import End, ErrorEvent, Started, Token
from worker.jobs.keys import START, is_entry_id
from worker.jobs.protocol import DEFAULT_MAX_TOKENS
from worker.jobs.reader import StreamEvent
from worker.jobs.streams import Disconnected

EventPage = list[StreamEvent]
_CANCEL_S = 30.0
_CANCEL_PAUSE_S = 0.2
_DEADLINE_MARGIN_S = 0.25
"""For which a job that runs may take to end itself at its deadline."""
_FIRST_DIGITS = 16
_POSITION = re.compile(r"([A-Za-z]+[-_][0-9a-f]{32}):([0-9]+-[0-9]+):([0-9]+(?:\.[0-9]+)*)")


@dataclass(frozen=True, slots=True)
class Position:
    """The `id` of a server-sent event: the jobs, a Redis entry id, and a step of each choice.

    Steps count what a client has received of a choice: 1 + tokens, one more for its finish reason.
    """

    group: str
    entry_id: str
    steps: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.group}:{self.entry_id}:{'.'.join(map(str, self.steps))}"

    @classmethod
    def parse(cls, text: str) -> Position:
        """Parse `Last-Event-ID`. Raises status 400."""
        match = _POSITION.fullmatch(text)
        if match is None or not is_entry_id(match[2]):
            raise invalid("Last-Event-ID is not the id of an event of this API", "Last-Event-ID")
        return cls(match[1], match[2], tuple(map(int, match[3].split("."))))


class JobRun:
    """One job of a request."""

    def __init__(self, context: GatewayContext, call: Call, job_id: str) -> None:
        self.id = job_id
        self._context = context
        self._call = call
        self._submission: asyncio.Task[str] | None = None
        self._attached = False
        self._ended = False
        self._read_tokens = 0
        """Tokens of prompt and answer that were read."""
        self._model = ""
        self._deadline_s = math.inf
        """`time.monotonic` at which a job that waits has missed its deadline."""

    async def submit(self, fields: Mapping[str, Any]) -> None:
        """Enqueue the job, unless the request has a key and the job is known.

        Raises what `Client.submit` does.
        """
        self._model = fields.get("model") or ""
        if fields.get("deadline_ms"):
            self._deadline_s = time.monotonic() + fields["deadline_ms"] / 1000 + _DEADLINE_MARGIN_S
        if self._call.idempotency_key is not None and await self._context.client.is_known(self.id):
            self._attach()
            return
        # A task, since a cancelled submission may have reached the server: `release` waits for it.
        self._submission = asyncio.create_task(self._context.client.submit(job_id=self.id, **fields))
        self._submission.add_done_callback(_retrieve_error)
        await asyncio.shield(self._submission)
        self._context.metrics.jobs.inc()

    async def attach(self, model: str) -> None:
        """Attach to a job that another request submitted. Raises status 404 if it is unknown."""
        if not await self._context.client.is_known(self.id):
            message = f"the job {self.id} is unknown, or its events have expired"
            raise ApiError(HTTPStatus.NOT_FOUND, message, code="stream_not_found", param="Last-Event-ID")
        self._model = model
        self._attach()

    def _attach(self) -> None:
        self._attached = True
        self._context.metrics.attached.inc()

    async def pages(self) -> AsyncGenerator[EventPage, None]:
        """Yield all events of the job in lists, up to its `end`.

        Raises:
            ApiError: the job failed, or nothing happens and no worker serves its model or its
                deadline has passed.
        """
        client, after, next_i = self._context.client, START, 0
        while True:
            try:
                async with contextlib.aclosing(client.event_pages(self.id, after, self._idle_s(), next_i)) as pages:
                    async for page in pages:
                        after = page[-1].resume
                        next_i = self._observe(page, next_i)
                        error = self._error_of(page[-1])
                        yield page if error is None else page[:-1]
                        if error is not None:
                            raise error
                    return
            except TimeoutError:
                if time.monotonic() >= self._deadline_s:
                    raise deadline_passed("the job's deadline has passed") from None
                if self._model:
                    self._context.models.check(self._model)

    def _idle_s(self) -> float:
        """Time without an event after which the job is looked at."""
        return max(0.0, min(self._context.section.no_worker_s, self._deadline_s - time.monotonic()))

    def _error_of(self, last: StreamEvent) -> ApiError | None:
        if not isinstance(last.event, ErrorEvent):
            return None
        self._ended = True
        return error_of_event(last.event)

    def _observe(self, page: EventPage, next_i: int) -> int:
        """Count the page's tokens; return the index of the next one."""
        tokens = [item for item in page if isinstance(item.event, Token)]
        metrics = self._context.metrics
        self._read_tokens += len(tokens)
        self._read_tokens += sum(item.event.prompt_tokens for item in page if isinstance(item.event, Started))
        if tokens:
            metrics.tokens.inc(len(tokens))
            if next_i == 0 and not self._attached:
                metrics.first_token.observe(time.monotonic() - self._call.received_s)
                metrics.relay.observe(max(0.0, time.time() - tokens[0].envelope.ts_ms / 1000))
            next_i += len(tokens)
        if isinstance(page[-1].event, End):
            self._ended = True
        return next_i

    def release(self) -> None:
        """Stop reading: cancel the job in the background unless it has ended or has a key.

        A gateway that stops before its streams have ended leaves their jobs to other gateways. The
        tokens that were read count towards the caller's rate, once.
        """
        if not self._attached:
            self._call.caller.charge(self._read_tokens)
            self._read_tokens = 0
        if self._ended or self._call.idempotency_key is not None or self._context.stopping:
            return
        if self._attached or self._submission is not None:
            self._context.run_in_background(self._cancel())

    async def _cancel(self) -> None:
        """Cancel the job once its submission has ended. Repeated while the server is away."""
        if self._submission is not None:
            await asyncio.wait({self._submission})
            error = self._submission.exception()
            if error is not None and not isinstance(error, Disconnected):
                return  # refused: there is no job
        deadline = time.monotonic() + _CANCEL_S
        while True:
            try:
                outcome = await self._context.client.cancel(self.id)
            except (Disconnected, WorkerError) as failure:
                if time.monotonic() >= deadline:
                    self._context.log.error("cancel_failed", job_id=self.id, reason=str(failure))
                    return
                await asyncio.sleep(_CANCEL_PAUSE_S)
                continue
            if outcome in ("cancelled", "requested"):
                self._context.metrics.cancelled.inc()
            self._context.log.info("cancelled", job_id=self.id, outcome=outcome)
            return


def _retrieve_error(submission: asyncio.Task[str]) -> None:
    """Retrieve the error of a submission whose request has ended."""
    if not submission.cancelled():
        submission.exception()


class JobGroup:
    """The jobs of one request, one for each choice. Call `start`, read `pages`, call `close`."""

    def __init__(self, context: GatewayContext, call: Call, prefix: str, jobs: Sequence[Mapping[str, Any]]) -> None:
        self._context = context
        self._call = call
        self._jobs = jobs
        self.resumed = None if call.last_event_id is None else Position.parse(call.last_event_id)
        """What the client has received."""
        self.id = self._resumed_id(prefix) if self.resumed else _group_id(call, prefix, jobs)
        call.job_id, call.model = self.id, jobs[0].get("model")
        call.job_ids = names = [self.id, *(f"{self.id}-{index}" for index in range(1, len(jobs)))]
        self.runs = [JobRun(context, call, name) for name in names]

    def _resumed_id(self, prefix: str) -> str:
        position = self.resumed
        assert position is not None, "checked by the caller"
        first = position.group.removeprefix(prefix)[:_FIRST_DIGITS]
        given = _first_digits(self._call)
        same = position.group == _group_id(self._call, prefix, self._jobs, first)
        if not same or first != (given or first) or len(position.steps) != len(self._jobs):
            message = "Last-Event-ID belongs to another request: send the same body with the same keys"
            raise invalid(message, "Last-Event-ID", "stream_mismatch")
        return position.group

    async def start(self) -> None:
        """Submit the jobs, or attach to those of the `Last-Event-ID`.

        Raises ApiError and what `Client.submit` does. Jobs that were submitted before an error are
        cancelled by `close`.
        """
        if self.resumed is not None:
            models = [str(fields.get("model") or "") for fields in self._jobs]
            await asyncio.gather(*(run.attach(model) for run, model in zip(self.runs, models, strict=True)))
            return
        self._call.caller.admit()
        jobs = [self._with_trace(fields) for fields in self._jobs]
        submissions = [run.submit(fields) for run, fields in zip(self.runs, jobs, strict=True)]
        if len(submissions) == 1:
            await submissions[0]
            return
        outcomes = await asyncio.gather(*submissions, return_exceptions=True)
        for outcome in outcomes:
            if outcome is not None:
                raise outcome

    def _with_trace(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        call = self._call
        job = dict(fields) | {"correlation_id": call.request_id, "traceparent": call.traceparent}
        if call.caller.tenant is not None:
            job["tenant"] = call.caller.tenant
        if self._context.section.deadline_s and job.get("deadline_ms") is None:
            job["deadline_ms"] = round(self._context.section.deadline_s * 1000)
        return job

    async def pages(self) -> AsyncGenerator[tuple[int, EventPage], None]:
        """Yield pages of events, each with the index of its choice, until every job has ended.

        Raises as `JobRun.pages` does: the first job that fails ends all.
        """
        if len(self.runs) == 1:
            async with contextlib.aclosing(self.runs[0].pages()) as pages:
                async for page in pages:
                    yield 0, page
            return
        merged: asyncio.Queue[tuple[int, EventPage | Exception | None]] = asyncio.Queue(len(self.runs))
        readers = [asyncio.create_task(_read(index, run, merged)) for index, run in enumerate(self.runs)]
        try:
            left = len(readers)
            while left:
                index, item = await merged.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield index, item
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)

    def reserve(self) -> None:
        """Count the most tokens of answers in the background towards the caller's rate."""
        self._call.caller.charge(sum(job.get("max_tokens") or DEFAULT_MAX_TOKENS for job in self._jobs))

    def close(self) -> None:
        """Cancel the jobs that have not ended, unless the request has a key. Does not wait."""
        for run in self.runs:
            run.release()


async def _read(index: int, run: JobRun, merged: asyncio.Queue[tuple[int, EventPage | Exception | None]]) -> None:
    try:
        async with contextlib.aclosing(run.pages()) as pages:
            async for page in pages:
                await merged.put((index, page))
        await merged.put((index, None))
    except Exception as error:
        await merged.put((index, error))


def _group_id(call: Call, prefix: str, jobs: Sequence[Mapping[str, Any]], first: str | None = None) -> str:
    """The id of a request's jobs; `first` are the first digits of one that is resumed."""
    first = first or _first_digits(call) or secrets.token_hex(_FIRST_DIGITS // 2)
    return prefix + first + _digest(call.caller.tenant or "", first, json.dumps(jobs, sort_keys=True))


def _first_digits(call: Call) -> str | None:
    """The first digits of a request with an `Idempotency-Key`, else None."""
    key = call.idempotency_key
    return None if key is None else _digest(call.caller.tenant or "", key)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:_FIRST_DIGITS]
