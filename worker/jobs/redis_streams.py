"""The Redis side of seam 1: redis-py for single commands, `lua/*.lua` for what must be one step. Redis 7.0 is enough.

The only module that imports redis. Blocking reads have a client of their own, whose socket outlives every block;
neither client retries silently, because the layer above must know when a reply was lost. What the calls mean is in
`streams.py`.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Mapping
from importlib import resources
from typing import Any, Self

from redis import exceptions
from redis.asyncio import Connection, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.commands.core import AsyncScript

from worker.jobs.keys import GROUP, START, WORKERS, after, dead_key, events_key, queue_key, state_key, worker_key
from worker.jobs.replies import Value, flat, named, records_of, text, texts
from worker.jobs.streams import (
    AppendCall,
    CancelCall,
    Disconnected,
    Entry,
    Fields,
    JobState,
    Pending,
    Record,
    TakeCall,
    TakeReply,
)

COMMAND_TIMEOUT_S = 5.0
MAX_BLOCK_MS = 30_000
BLOCKING_TIMEOUT_S = 35.0
"""No read blocks as long as its socket waits."""

_NO_GROUP = object()

_TRANSIENT = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.ReadOnlyError,
    exceptions.MasterDownError,
    exceptions.ClusterDownError,
    exceptions.TryAgainError,
    exceptions.OutOfMemoryError,
)
"""A failover, a restart, a full server: they pass, and asking again is what helps."""


class RedisStreams:
    """`Streams` over two redis-py clients, one for commands and one for blocking reads."""

    def __init__(self, commands: Redis, blocking: Redis) -> None:
        self._commands = commands
        self._blocking = blocking
        self._reconnects = 0
        self._opened: weakref.WeakSet[Connection] = weakref.WeakSet()
        of_job, of_queue = ("take", "append", "cancel", "state"), ("renew", "settle", "enqueue", "remove_consumers")
        scripts = {name: commands.register_script(_lua("job") + _lua(name)) for name in of_job}
        scripts |= {name: commands.register_script(_lua(name)) for name in of_queue}
        self._take, self._append, self._cancel, self._state = (scripts[name] for name in of_job)
        self._renew, self._settle, self._enqueue, self._remove_consumers = (scripts[name] for name in of_queue)

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Two clients of the server at `url` (redis:// or rediss://); they connect when first used."""

        def client(socket_timeout: float) -> Redis:
            return Redis.from_url(
                url,
                protocol=2,
                socket_timeout=socket_timeout,
                socket_connect_timeout=COMMAND_TIMEOUT_S,
                retry=Retry(NoBackoff(), 0),
            )

        streams = cls(client(COMMAND_TIMEOUT_S), client(BLOCKING_TIMEOUT_S))
        for each in (streams._commands, streams._blocking):
            each.connection_pool.connection_kwargs["redis_connect_func"] = streams._on_connect
        return streams

    @property
    def reconnects(self) -> int:
        """How often a connection of either client was made again."""
        return self._reconnects

    async def _on_connect(self, connection: Connection) -> None:
        await connection.on_connect()
        if connection in self._opened:
            self._reconnects += 1
        self._opened.add(connection)

    async def open_queue(self, queue: str) -> None:
        """XGROUP CREATE from id 0, with the stream."""
        try:
            await _asked(self._commands.xgroup_create(queue_key(queue), GROUP, id="0", mkstream=True))
        except exceptions.ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    async def enqueue(self, queue: str, fields: Fields, bound: int) -> str | None:
        """One script: length and XADD in one step."""
        reply = await _asked(self._enqueue(keys=[queue_key(queue)], args=[bound, *flat(fields.items())]))
        return None if reply is None else text(reply)

    async def read_new(self, queue: str, consumer: str, block_ms: int) -> Entry | None:
        """XREADGROUP of one entry. A server that answers before the time is up is not asked again at once."""
        clock = asyncio.get_running_loop().time
        until = clock() + block_ms / 1000
        read = self._blocking.xreadgroup(GROUP, consumer, {queue_key(queue): ">"}, count=1, block=max(1, block_ms))
        reply = await _asked(read, no_group=_NO_GROUP)
        if reply is _NO_GROUP:  # the server has lost it, or was emptied
            await self.open_queue(queue)
            return None
        for entry_id, fields in records_of(reply):
            return Entry(entry_id, fields, 1)
        if (left := until - clock()) > 0:
            await asyncio.sleep(min(left, 0.01))
        return None

    async def read_own(self, queue: str, consumer: str, above: str) -> Entry | None:
        """XPENDING and XRANGE, which count no delivery as XREADGROUP of the history does."""
        key = queue_key(queue)
        pending = self._commands.xpending_range(key, GROUP, after(above), "+", 1, consumername=consumer)
        for row in await _asked(pending, no_group=[]):
            entry_id = text(row["message_id"])
            records = await self.range(key, entry_id, entry_id, 1)
            return Entry(entry_id, records[0][1] if records else {}, row["times_delivered"])
        return None

    async def reclaim(self, queue: str, consumer: str, min_idle_ms: int, cursor: str) -> tuple[str, Entry | None]:
        """XAUTOCLAIM of one entry: the server looks at ten for each that it may claim, hence the cursor."""
        claim = self._commands.xautoclaim(queue_key(queue), GROUP, consumer, min_idle_ms, cursor, count=1)
        reply = await _asked(claim, no_group=(START, []))
        for entry_id, fields in reply[1]:
            pending = await _asked(self._commands.xpending_range(queue_key(queue), GROUP, entry_id, entry_id, 1))
            deliveries = pending[0]["times_delivered"] if pending else 1
            return text(reply[0]), Entry(text(entry_id), named(fields), deliveries)
        return text(reply[0]), None

    async def renew(self, queue: str, consumer: str, entry_id: str) -> bool:
        """`renew.lua`."""
        return bool(await self._on_queue(self._renew, queue, consumer, entry_id))

    async def give_back(self, queue: str, consumer: str, entry_id: str, idle_ms: int, deliveries: int) -> bool:
        """`renew.lua` with an idle time and a count."""
        return bool(await self._on_queue(self._renew, queue, consumer, entry_id, idle_ms, deliveries))

    async def settle(self, queue: str, entry_id: str, dead: Fields | None) -> bool:
        """`settle.lua`."""
        return bool(await self._on_queue(self._settle, queue, entry_id, *flat((dead or {}).items())))

    async def remove_consumers(self, queue: str, name: str | None, min_idle_ms: int) -> int:
        """`remove_consumers.lua`."""
        names = [] if name is None else [name]
        return int(await self._on_queue(self._remove_consumers, queue, min_idle_ms, *names))

    async def _on_queue(self, script: AsyncScript, queue: str, *args: Value) -> Any:
        return await _asked(script(keys=[queue_key(queue), dead_key(queue)], args=[GROUP, *args]), no_group=0)

    async def pending(self, queue: str, count: int) -> list[Pending]:
        """XPENDING."""
        rows = await _asked(self._commands.xpending_range(queue_key(queue), GROUP, "-", "+", count), no_group=[])
        return [
            Pending(text(r["message_id"]), text(r["consumer"]), r["time_since_delivered"], r["times_delivered"])
            for r in rows
        ]

    async def job_state(self, job_id: str) -> JobState:
        """`state.lua`."""
        top, fields = await self._on_job(self._state, job_id)
        return JobState(text(top), texts(dict(zip(fields[::2], fields[1::2], strict=True))))

    async def take(self, job_id: str, call: TakeCall) -> TakeReply:
        """`take.lua`."""
        opening = call.opening
        reply = await self._on_job(
            self._take,
            job_id,
            *(call.entry_id, call.worker, call.expected, call.epoch, call.now_ms, call.ttl_ms),
            *(call.deliveries, call.max_deliveries, call.max_barren),
            *(opening.kind, opening.packed, call.opening_code, call.cancelled.packed, call.poisoned.packed),
        )
        return TakeReply(*map(text, reply))

    async def append(self, job_id: str, call: AppendCall) -> str:
        """`append.lua`."""
        reply = await self._on_job(
            self._append,
            job_id,
            *(call.expected, call.epoch, call.worker, call.state, call.tokens, call.code, call.now_ms, call.ttl_ms),
            *flat((entry_id, event.kind, event.packed) for entry_id, event in call.events),
        )
        return text(reply)

    async def cancel(self, job_id: str, call: CancelCall) -> str:
        """`cancel.lua`."""
        args = (call.expected, call.epoch, call.now_ms, call.ttl_ms, call.event.kind, call.event.packed)
        return text(await self._on_job(self._cancel, job_id, *args))

    async def _on_job(self, script: AsyncScript, job_id: str, *args: Value) -> Any:
        return await _asked(script(keys=[events_key(job_id), state_key(job_id)], args=args))

    async def expire(self, key: str, ttl_ms: int) -> None:
        """PEXPIRE LT."""
        await _asked(self._commands.pexpire(key, ttl_ms, lt=True))

    async def add(self, key: str, fields: Fields, keep: int, ttl_ms: int | None) -> str:
        """XADD MAXLEN ~, and PEXPIRE."""
        entry_id = await _asked(self._commands.xadd(key, dict(fields.items()), maxlen=keep, approximate=True))
        if ttl_ms is not None:
            await _asked(self._commands.pexpire(key, ttl_ms))
        return text(entry_id)

    async def read(self, key: str, after: str, block_ms: int, count: int = 100) -> list[Record]:
        """XREAD, blocking if block_ms is above 0."""
        block = min(block_ms, MAX_BLOCK_MS)
        client, wait = (self._blocking, block) if block > 0 else (self._commands, None)
        reply = await _asked(client.xread({key: after}, count=count, block=wait))
        return records_of(reply)

    async def range(self, key: str, first: str, last: str, count: int) -> list[Record]:
        """XRANGE."""
        records = await _asked(self._commands.xrange(key, first, last, count))
        return [(text(entry_id), named(fields)) for entry_id, fields in records]

    async def last_id(self, key: str) -> str:
        """`last-generated-id` of XINFO STREAM, which trimming leaves as it is."""
        try:
            return text((await _asked(self._commands.xinfo_stream(key)))["last-generated-id"])
        except exceptions.ResponseError as error:
            if "no such key" not in str(error):
                raise
            return START

    async def delete(self, key: str, entry_id: str) -> bool:
        """XDEL."""
        return bool(await _asked(self._commands.xdel(key, entry_id)))

    async def put_status(self, worker: str, status: Mapping[str, str], ttl_ms: int) -> None:
        """A member of the sorted set of workers, by time, and a hash with an expiry."""
        key, now = worker_key(worker), await self.time_ms()
        async with self._commands.pipeline(transaction=True) as pipe:
            pipe.hset(key, mapping=dict(status.items()))
            pipe.pexpire(key, ttl_ms)
            await _asked(pipe.execute())
        await _asked(self._commands.zadd(WORKERS, {worker: now}))
        await _asked(self._commands.zremrangebyscore(WORKERS, "-inf", now - 10 * ttl_ms))

    async def drop_status(self, worker: str) -> None:
        """ZREM and DEL."""
        await _asked(self._commands.zrem(WORKERS, worker))
        await _asked(self._commands.delete(worker_key(worker)))

    async def workers(self) -> dict[str, Mapping[str, str]]:
        """The sorted set's members that still have a hash."""
        names = [text(name) for name in await _asked(self._commands.zrange(WORKERS, 0, -1))]
        found = {name: texts(await _asked(self._commands.hgetall(worker_key(name)))) for name in names}
        return {name: status for name, status in found.items() if status}

    async def time_ms(self) -> int:
        """TIME."""
        seconds, micros = await _asked(self._commands.time())
        return int(seconds) * 1000 + int(micros) // 1000

    async def close(self) -> None:
        """Both clients."""
        await self._commands.aclose()
        await self._blocking.aclose()


async def _asked(reply: Awaitable[Any], no_group: Any = None) -> Any:
    """The reply, or `no_group` where the queue has no consumer group. Raises Disconnected for what passes.

    A cancellation that comes with the reply is heeded: Python 3.11's `wait_for`, under redis-py, would drop it.
    """
    task = asyncio.current_task()
    cancellations = task.cancelling() if task else 0
    try:
        return await reply
    except _TRANSIENT as error:
        raise Disconnected(str(error)) from error
    except exceptions.ResponseError as error:
        if "NOGROUP" not in str(error):
            raise
        return no_group
    finally:
        if task and task.cancelling() > cancellations:
            raise asyncio.CancelledError


def _lua(name: str) -> str:
    return (resources.files("worker.jobs") / "lua" / f"{name}.lua").read_text()
