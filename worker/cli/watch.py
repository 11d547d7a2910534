"""`worker tail --all`: the events of every worker and every job of one queue, as they come.

It follows the registry and the queue, and each stream that they lead to; `worker/jobs/client.py` reads a single one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import NoReturn

from worker.jobs.client import Client
from worker.jobs.keys import START, order_of, queue_key, worker_events_key
from worker.jobs.payload import job_id_of
from worker.jobs.received import Received
from worker.jobs.streams import Streams

_LOOK_S = 1.0
_BLOCK_MS = 1000


class Watch:
    """One queue of one server, and all workers. `events` from `since`, an entry id whose first half is a time."""

    def __init__(self, streams: Streams, queue: str, since: str | None) -> None:
        self._streams = streams
        self._client = Client(streams, queue)
        self._queue = queue
        self._since = since
        self._heard: asyncio.Queue[Received | Exception] = asyncio.Queue(10_000)
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def events(self) -> AsyncGenerator[Received, None]:
        """Every event, of one stream in its order, for ever. Raises what reading raises."""
        self._start("workers", self._find_workers)
        self._start("jobs", self._find_jobs)
        try:
            while True:
                item = await self._heard.get()
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            for task in self._tasks.values():
                task.cancel()

    def _start(self, key: str, work: Callable[[], Awaitable[None]]) -> None:
        async def run() -> None:
            try:
                await work()
            except Exception as error:
                await self._heard.put(error)

        if key not in self._tasks:
            self._tasks[key] = asyncio.create_task(run())

    def _follow(self, key: str, events: AsyncIterator[Received]) -> None:
        async def follow() -> None:
            async for item in events:
                await self._heard.put(item)

        self._start(key, follow)

    async def _find_workers(self) -> NoReturn:
        first = self._since is None
        while True:
            for name in await self._client.workers():
                if f"worker {name}" in self._tasks:
                    continue
                after = await self._streams.last_id(worker_events_key(name)) if first else self._since or START
                self._follow(f"worker {name}", self._client.worker_events(name, after))
            first = False
            await asyncio.sleep(_LOOK_S)

    async def _find_jobs(self) -> NoReturn:
        """Every entry of the queue now, waiting or running, and every later one."""
        after = START
        while True:
            for entry_id, fields in await self._streams.read(queue_key(self._queue), after, _BLOCK_MS):
                after = entry_id
                job_id = job_id_of(fields.get("p", b""))
                if job_id is not None and order_of(after) > order_of(self._since or START):
                    self._follow(f"job {job_id}", self._client.events(job_id))


async def watch(streams: Streams, queue: str, since: str | None, show: Callable[[Received], None]) -> None:
    """Show every event until cancelled, and close the connections."""
    try:
        async with aclosing(Watch(streams, queue, since).events()) as events:
            async for item in events:
                show(item)
    finally:
        await streams.close()
