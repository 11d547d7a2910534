"""Writes without fencing, to prove that the checker finds the resulting violations.

Any worker's events are appended at the end of the stream, and any worker can renew an entry.
"""

from __future__ import annotations

from collections.abc import Sequence

from worker.jobs.keys import GROUP, epoch_of, events_key, queue_key, state_key
from worker.jobs.redis_streams import RedisStreams
from worker.jobs.streams import AppendCall, Disconnected, Ownership


async def append(self: RedisStreams, job_id: str, call: AppendCall) -> str:
    """Replaces `append.lua`: checks neither the last id nor the epoch."""
    run = self._run
    try:
        epoch = epoch_of(await self.last_id(events_key(job_id)))
        for _, event in call.events:
            await run("XADD", events_key(job_id), f"{epoch}-*", "type", event.kind, "p", event.packed)
        fields = ("epoch", call.epoch, "worker", call.worker, "state", call.state, "tokens", call.tokens)
        await run("HSET", state_key(job_id), *fields)
        if call.state in ("end", "error"):
            await run("HSET", state_key(job_id), "ended_ms", call.now_ms)
    except ConnectionError as error:
        raise Disconnected(str(error)) from error
    return call.events[-1][0] if call.events else call.expected


async def renew(self: RedisStreams, queue: str, consumer: str, entry_id: str) -> Ownership:
    """Replaces `renew.lua`: the calling consumer always gets the entry."""
    await self._run("XCLAIM", queue_key(queue), GROUP, consumer, 0, entry_id, "JUSTID")
    return "held"


async def renew_many(
    self: RedisStreams, consumer: str, calls: Sequence[tuple[str, str, str | None]]
) -> list[tuple[Ownership, bool] | None]:
    """Replaces the pipeline of `renew.lua`: the caller makes single calls."""
    return [None] * len(calls)


async def append_many(self: RedisStreams, calls: Sequence[tuple[str, AppendCall]]) -> list[str | None]:
    """Replaces the pipeline of `append.lua`."""
    return [await append(self, job_id, call) for job_id, call in calls]


def remove_fencing() -> None:
    """Patch RedisStreams in this process."""
    RedisStreams.append = append  # type: ignore[method-assign]
    RedisStreams.append_many = append_many  # type: ignore[method-assign]
    RedisStreams.renew = renew  # type: ignore[method-assign]
    RedisStreams.renew_many = renew_many  # type: ignore[method-assign]
