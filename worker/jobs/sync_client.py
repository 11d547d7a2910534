"""The client without `await`: the same calls and iterators, for orchestrators that know no asyncio.

    with SyncClient.from_url("redis://localhost") as client:
        job_id = client.submit(prompt="Once upon a time", max_tokens=50)
        for token in client.tokens(job_id):
            print(token.t, end="")

For one thread, outside of any running event loop. What the calls do is `client.py`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from typing import Any, Self, TypeVar

from worker.jobs.client import Client, DeadLetter, QueueEntry
from worker.jobs.events import End, Token
from worker.jobs.keys import START
from worker.jobs.received import Received

T = TypeVar("T")


class SyncClient:
    """Runs a `Client`, made by `connect` inside, on an event loop of its own."""

    def __init__(self, connect: Callable[[], Client]) -> None:
        self._runner = asyncio.Runner()
        try:
            self._client = self._run(_made(connect))
        except BaseException:
            self._runner.close()  # nobody else can
            raise
        self._open = True

    @classmethod
    def from_url(cls, url: str, queue: str = "default", bound: int = 10_000) -> Self:
        """A client of the Redis server at `url`; it connects when first used."""
        return cls(lambda: Client.from_url(url, queue, bound))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections and the loop."""
        self._open = False
        self._run(self._client.close())
        self._runner.close()

    def submit(self, **fields: Any) -> str:
        """Enqueue a job; its id. Raises InvalidRequest or QueueFull."""
        return self._run(self._client.submit(**fields))

    def events(
        self, job_id: str, after: str = START, idle_s: float | None = None, next_i: int | None = None
    ) -> Iterator[Received]:
        """The job's events above the id `after`, as they come, to the terminal one; see `Client.events`."""
        return self._each(self._client.events(job_id, after, idle_s, next_i))

    def tokens(
        self, job_id: str, after: str = START, idle_s: float | None = None, next_i: int | None = None
    ) -> Iterator[Token]:
        """The answer's tokens. Raises JobFailed."""
        return self._each(self._client.tokens(job_id, after, idle_s, next_i))

    def result(self, job_id: str, idle_s: float | None = None) -> tuple[str, End]:
        """The whole text and the `end` event. Raises JobFailed."""
        return self._run(self._client.result(job_id, idle_s))

    def cancel(self, job_id: str) -> str:
        """`cancelled`, `requested` or `over`."""
        return self._run(self._client.cancel(job_id))

    def drain(self, worker: str) -> None:
        """Ask a worker to take no more jobs, finish, and stop."""
        self._run(self._client.drain(worker))

    def state(self, job_id: str) -> Mapping[str, str]:
        """The job's state hash; empty for an unknown job."""
        return self._run(self._client.state(job_id))

    def queue(self, count: int = 100) -> list[QueueEntry]:
        """The queue's first entries, waiting and running."""
        return self._run(self._client.queue(count))

    def workers(self) -> dict[str, Mapping[str, str]]:
        """The status of each living worker."""
        return self._run(self._client.workers())

    def worker_events(self, worker: str, after: str = START) -> Iterator[Received]:
        """A worker's own events above the id `after`, for ever."""
        return self._each(self._client.worker_events(worker, after))

    def dead_letters(self, count: int = 100) -> list[DeadLetter]:
        """The oldest dead letters."""
        return self._run(self._client.dead_letters(count))

    def dead_letter(self, entry_id: str) -> DeadLetter | None:
        """The dead letter of that id."""
        return self._run(self._client.dead_letter(entry_id))

    def retry_dead_letter(self, letter: DeadLetter) -> str:
        """Submit the job again under a new id."""
        return self._run(self._client.retry_dead_letter(letter))

    def drop_dead_letter(self, entry_id: str) -> bool:
        """Delete a dead letter."""
        return self._run(self._client.drop_dead_letter(entry_id))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return self._runner.run(work)
        except KeyboardInterrupt:
            # One that came as the work ended leaves the loop's stop behind, which would end the next run at once.
            loop = self._runner.get_loop()
            loop.call_soon(loop.stop)
            loop.run_forever()
            raise

    def _each(self, events: AsyncIterator[T]) -> Iterator[T]:
        try:
            while (item := self._run(_next(events))) is not None:
                yield item
        finally:
            if self._open:
                self._run(_closed(events))


async def _made(connect: Callable[[], Client]) -> Client:
    return connect()


async def _next(events: AsyncIterator[T]) -> T | None:
    return await anext(events, None)


async def _closed(events: AsyncIterator[Any]) -> None:
    if hasattr(events, "aclose"):
        await events.aclose()
