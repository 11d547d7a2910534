"""`worker tail --all`: events of all workers, and of all jobs of one queue, as they are written.

Polls the registry and the queue, and reads each stream found there with a `Client`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import NoReturn

from worker.jobs.client import Client
from worker.jobs.keys import START, queue_key, split_id, worker_events_key
from worker.jobs.payload import job_id_of
from worker.jobs.reader import StreamEvent
from worker.jobs.streams import Streams

_POLL_S = 1.0
_BLOCK_MS = 1000
_MAX_BUFFERED = 10_000


class Watch:
    """Events of one queue's jobs and of all workers, from the entry id `since`."""

    def __init__(self, streams: Streams, queue: str, since: str | None) -> None:
        self._streams = streams
        self._client = Client(streams, queue)
        self._queue = queue
        self._since = since
        self._received: asyncio.Queue[StreamEvent | Exception] = asyncio.Queue(_MAX_BUFFERED)
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def events(self) -> AsyncGenerator[StreamEvent, None]:
        """Yield every event, those of one stream in order. Never ends; raises errors of reads."""
        self._start("workers", self._find_workers)
        self._start("jobs", self._find_jobs)
        try:
            while True:
                item = await self._received.get()
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            for task in self._tasks.values():
                task.cancel()

    def _start(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        async def run() -> None:
            try:
                await work()
            except Exception as error:
                await self._received.put(error)

        self._tasks[name] = asyncio.create_task(run())

    async def _follow(self, events: AsyncIterator[StreamEvent]) -> None:
        async for item in events:
            await self._received.put(item)

    async def _find_workers(self) -> NoReturn:
        first = self._since is None
        while True:
            for worker in await self._client.workers():
                name = f"worker {worker}"
                if name not in self._tasks:
                    after = await self._streams.last_id(worker_events_key(worker)) if first else self._since or START
                    self._start(name, partial(self._follow, self._client.worker_events(worker, after)))
            first = False
            await asyncio.sleep(_POLL_S)

    async def _find_jobs(self) -> NoReturn:
        """Follow each job that is in the queue, waiting or running, and each later one."""
        after = START
        while True:
            for entry_id, fields in await self._streams.read(queue_key(self._queue), after, _BLOCK_MS):
                after = entry_id
                job_id = job_id_of(fields.get("p", b""))
                is_new = split_id(after) > split_id(self._since or START)
                if job_id is not None and is_new and f"job {job_id}" not in self._tasks:
                    self._start(f"job {job_id}", partial(self._follow, self._client.events(job_id)))


async def watch(streams: Streams, queue: str, since: str | None, show: Callable[[StreamEvent], None]) -> None:
    """Pass every event to `show` until cancelled, then close the connections."""
    try:
        async with aclosing(Watch(streams, queue, since).events()) as events:
            async for item in events:
                show(item)
    finally:
        await streams.close()
