"""Runs batches: every gateway looks for batches that no other one runs, and runs them.

A batch is run under a lease. If its gateway stops or stalls, another one takes the lease and goes
on: lines with a result are skipped, and a line whose job was submitted attaches to that job, since
its id is a function of batch and line. So each request runs once, even if two gateways run the same
batch for a moment. `batch_store.py` has the state, `batches.py` the HTTP API.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any

from worker.errors import EventsLost, WorkerError
from worker.gateway.batch_lines import (
    MAX_MISTAKES,
    MAX_REQUESTS,
    LineRequest,
    Mistake,
    Outcome,
    expired_line,
    parse_line,
    result_line,
)
from worker.gateway.batch_store import Batch, BatchStore
from worker.gateway.errors import ApiError
from worker.gateway.file_store import FileStore, StoredFile
from worker.jobs.streams import Disconnected
from worker.telemetry import Log, frames_of

_PAGE = 100
_RETRY_S = 1.0
_MAX_RETRY_S = 30.0

Execute = Callable[[Batch, LineRequest], Awaitable[Outcome]]
"""Answers one request. Repeated calls attach to the same job. Raises Disconnected."""
Cancel = Callable[[Batch, LineRequest], Awaitable[None]]
"""Cancels the jobs of a request whose `Execute` is running."""


@dataclass(frozen=True, slots=True)
class RunnerSettings:
    """Times in seconds."""

    concurrency: int = 16
    """Requests of one batch that wait or run at a time."""
    scan_s: float = 2.0
    lease_s: float = 15.0
    renew_s: float = 3.0
    cancel_poll_s: float = 1.0


class LeaseLost(Exception):
    """Another gateway runs the batch."""


class _Running:
    """The requests of one batch that are being answered, at most `limit`."""

    def __init__(self, limit: int) -> None:
        self.requests: dict[asyncio.Task[None], LineRequest] = {}
        self.fault: BaseException | None = None
        """What ended a task that should have put a result."""
        self._limit = limit

    async def wait_for_slot(self, cancelling: asyncio.Task[None]) -> None:
        """Wait until a request can start, or until the batch is to be cancelled."""
        while len(self.requests) >= self._limit and not (cancelling.done() or self.fault):
            await asyncio.wait((cancelling, *self.requests), return_when=asyncio.FIRST_COMPLETED)

    def start(self, request: LineRequest, work: Coroutine[Any, Any, None]) -> None:
        """Answer a request in a task of its own."""
        task = asyncio.create_task(work)
        self.requests[task] = request
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self.requests[task]
        if not task.cancelled() and (fault := task.exception()) is not None:
            self.fault = fault

    async def stop(self) -> None:
        """Stop waiting for answers; the jobs go on."""
        tasks = list(self.requests)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class BatchRunner:
    """The batches of one gateway process."""

    def __init__(
        self,
        batches: BatchStore,
        files: FileStore,
        execute: Execute,
        cancel: Cancel,
        log: Log,
        settings: RunnerSettings,
    ) -> None:
        self._batches = batches
        self._files = files
        self._execute = execute
        self._cancel = cancel
        self._log = log
        self._settings = settings
        self._owner = uuid.uuid4().hex
        self._running: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """Look for batches now: one was created."""
        self._wake.set()

    async def run(self) -> None:
        """Look for batches and run them until cancelled; their leases are released then."""
        try:
            while True:
                self._wake.clear()
                with contextlib.suppress(Disconnected, WorkerError):
                    await self._scan()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._settings.scan_s):
                        await self._wake.wait()
        finally:
            tasks = list(self._running.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _scan(self) -> None:
        for batch_id in await self._batches.active():
            if batch_id not in self._running and await self._batches.hold(
                batch_id, self._owner, self._settings.lease_s
            ):
                task = asyncio.create_task(self._own(batch_id), name=f"batch-{batch_id}")
                self._running[batch_id] = task
                task.add_done_callback(partial(self._ended, batch_id))

    def _ended(self, batch_id: str, _: asyncio.Task[None]) -> None:
        del self._running[batch_id]

    async def _own(self, batch_id: str) -> None:
        """Run a batch while the lease is held."""
        work = asyncio.create_task(self._run(batch_id))
        renewal = asyncio.create_task(self._renew(batch_id))
        try:
            await asyncio.wait((work, renewal), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            else:
                renewal.result()
        except LeaseLost:
            self._log.warning("batch_lease_lost", batch=batch_id)
        except (Disconnected, WorkerError) as error:
            self._log.warning("batch_interrupted", batch=batch_id, error=str(error))
        except Exception as error:
            self._log.error("batch_failed", batch=batch_id, frames=frames_of(error))
        finally:
            for task in (work, renewal):
                task.cancel()
            await asyncio.gather(work, renewal, return_exceptions=True)
            with contextlib.suppress(Disconnected, WorkerError):
                await self._batches.release(batch_id, self._owner)

    async def _renew(self, batch_id: str) -> None:
        """Renew the lease until another runner has it. Raises LeaseLost."""
        until_s = time.monotonic() + self._settings.lease_s
        while True:
            await asyncio.sleep(self._settings.renew_s)
            try:
                if not await self._batches.hold(batch_id, self._owner, self._settings.lease_s):
                    raise LeaseLost(batch_id)
                until_s = time.monotonic() + self._settings.lease_s
            except Disconnected:
                if time.monotonic() > until_s:
                    raise LeaseLost(batch_id) from None

    async def _run(self, batch_id: str) -> None:
        batch = await self._batches.read(batch_id)
        if batch is None or batch.is_over:
            return await self._batches.close(batch_id)
        try:
            file = await self._files.find(batch.input_file_id, batch.tenant)
            if batch.status == "validating" and not await self._validate(batch, file):
                return await self._finish(batch, "failed")
            done = await self._batches.count_results(batch)
            if batch.status == "in_progress":
                await self._run_lines(batch, file, done)
                await self._advance(batch, "finalizing")
                await self._batches.count_results(batch)
            await self._write_files(batch)
        except (ApiError, EventsLost) as error:  # the input file has expired or was deleted
            batch.errors = [Mistake(None, "input_file_lost", str(error)).to_api()]
            return await self._fail(batch)
        except (Disconnected, WorkerError):
            raise  # a runner continues the batch when the server answers again
        except Exception as error:  # every further attempt would raise it too
            self._log.error("batch_failed", batch=batch_id, frames=frames_of(error))
            batch.errors = [Mistake(None, "internal_error", "internal error of the gateway").to_api()]
            return await self._fail(batch)
        current = await self._batches.read(batch_id) or batch
        if current.is_cancelling:
            return await self._finish(batch, "cancelled")
        late = batch.times["finalizing_at"] >= batch.times["expires_at"]
        return await self._finish(batch, "expired" if late else "completed")

    async def _validate(self, batch: Batch, file: StoredFile) -> bool:
        """Read the whole input file; return whether it has no mistakes."""
        mistakes: list[Mistake] = []
        custom_ids: set[str] = set()
        async for line, raw in _numbered(self._files.lines(file)):
            try:
                request = parse_line(line, raw, batch.endpoint)
                if request.custom_id in custom_ids:
                    raise Mistake(line, "duplicate_custom_id", "custom_id: given twice", "custom_id")
                custom_ids.add(request.custom_id)
                if len(custom_ids) > MAX_REQUESTS:
                    raise Mistake(line, "too_many_requests", f"at most {MAX_REQUESTS} requests in a batch")
            except Mistake as mistake:
                mistakes.append(mistake)
                if len(mistakes) == MAX_MISTAKES or mistake.code == "too_many_requests":
                    break
        if not custom_ids and not mistakes:
            mistakes.append(Mistake(None, "empty_file", "the input file has no requests"))
        batch.errors = [mistake.to_api() for mistake in mistakes]
        batch.total = len(custom_ids)
        if not mistakes:
            await self._advance(batch, "in_progress")
        return not mistakes

    async def _run_lines(self, batch: Batch, file: StoredFile, done: set[int]) -> None:
        """Run the lines without a result, until the batch is to be cancelled."""
        cancelling = asyncio.create_task(self._until_cancelled(batch.id))
        running = _Running(self._settings.concurrency)
        try:
            async for line, raw in _numbered(self._files.lines(file)):
                if line in done:
                    continue
                await running.wait_for_slot(cancelling)
                if cancelling.done() or running.fault:
                    break
                request = parse_line(line, raw, batch.endpoint)
                running.start(request, self._run_line(batch, request))
            while running.requests and not (cancelling.done() or running.fault):
                await asyncio.wait((cancelling, *running.requests), return_when=asyncio.FIRST_COMPLETED)
            if running.fault:
                raise running.fault
            if cancelling.done():
                batch.times["cancelling_at"] = int(time.time())
                await asyncio.gather(*(self._cancel(batch, request) for request in running.requests.values()))
        finally:
            cancelling.cancel()
            await running.stop()

    async def _until_cancelled(self, batch_id: str) -> None:
        while True:
            with contextlib.suppress(Disconnected, WorkerError):
                batch = await self._batches.read(batch_id)
                if batch is None or batch.is_cancelling:
                    return
            await asyncio.sleep(self._settings.cancel_poll_s)

    async def _run_line(self, batch: Batch, request: LineRequest) -> None:
        """Run a request, repeatedly while it is not accepted, and put its result."""
        while True:
            if batch.is_late:
                result, succeeded = expired_line(batch.id, request), False
                break
            try:
                outcome = await self._execute(batch, request)
            except Disconnected:
                await asyncio.sleep(_RETRY_S)
                continue
            if batch.is_cancelling:
                return
            if outcome.retry_after_s is None:
                result, succeeded = result_line(batch.id, request, outcome), outcome.is_success
                break
            await asyncio.sleep(min(outcome.retry_after_s, _MAX_RETRY_S))
        while True:
            try:
                return await self._batches.put_result(batch.id, request.line, result, succeeded=succeeded)
            except Disconnected:
                await asyncio.sleep(_RETRY_S)

    async def _write_files(self, batch: Batch) -> None:
        """Write the output and the error file, each unless it would be empty."""
        for succeeded, name in ((True, "output"), (False, "error")):
            file_id = f"file-{batch.id.removeprefix('batch_')}-{name}"
            file = await self._files.write(
                self._result_lines(batch, succeeded=succeeded),
                tenant=batch.tenant,
                filename=f"{batch.id}_{name}.jsonl",
                purpose="batch_output",
                expires_after_s=batch.output_expires_s,
                file_id=file_id,
            )
            if not file.bytes:
                await self._files.delete(file)
            elif succeeded:
                batch.output_file_id = file.id
            else:
                batch.error_file_id = file.id

    async def _result_lines(self, batch: Batch, *, succeeded: bool) -> AsyncIterator[bytes]:
        """Yield the results of one kind in the order of the input file."""
        last = max((int(line) for line in await self._batches.lines_with_results(batch.id)), default=0)
        for start in range(1, last + 1, _PAGE):
            for result, success in await self._batches.results(batch, range(start, start + _PAGE)):
                if success == succeeded:
                    yield result + b"\n"

    async def _advance(self, batch: Batch, status: str) -> None:
        batch.status = status
        batch.times[f"{status}_at"] = int(time.time())
        await self._batches.save(batch)

    async def _fail(self, batch: Batch) -> None:
        """End a batch as failed, with files of the results so far if those can be written."""
        try:
            await self._batches.count_results(batch)
            await self._write_files(batch)
        except (Disconnected, WorkerError):
            raise
        except Exception as error:
            self._log.error("batch_failed", batch=batch.id, frames=frames_of(error))
        await self._finish(batch, "failed")

    async def _finish(self, batch: Batch, status: str) -> None:
        """Save the last status; the output files have the results."""
        await self._advance(batch, status)
        await self._batches.close(batch.id)
        await self._batches.expire_results(batch)


async def _numbered(lines: AsyncIterator[bytes]) -> AsyncIterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, with their numbers from 1."""
    number = 0
    async for raw in lines:
        number += 1
        if raw.strip():
            yield number, raw
