"""`Streams` on Redis 7.0 or later, and Valkey: redis-py for single commands, `lua/` for the rest.

Blocking reads use a client of their own, whose socket timeout is longer than any block. Neither
client retries: the caller must know when a reply was lost. `redis_errors.py` has the exceptions.
"""

import asyncio
import contextlib
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from importlib import resources
from itertools import chain
from typing import Any, Self

from redis import exceptions
from redis.asyncio import Connection, Redis

from worker.errors import ConfigInvalid, ServerRefused
from worker.jobs.documents import Documents
from worker.jobs.events import TERMINAL_KINDS
from worker.jobs.keys import GROUP, START, WORKERS, dead_key, events_key, next_id, queue_key, state_key, worker_key
from worker.jobs.redis_documents import RedisDocuments
from worker.jobs.redis_errors import code_of, translate
from worker.jobs.redis_pool import WaitingPool, open_client
from worker.jobs.redis_replies import fields_of, stream_records, text_of, texts_of
from worker.jobs.redis_resp import Value, pack_command, raise_if_all_failed
from worker.jobs.streams import (
    STATUS_TTL_MS,
    AppendCall,
    CancelCall,
    Contact,
    Disconnected,
    Entry,
    Fields,
    JobState,
    Ownership,
    PendingEntry,
    QueueDepth,
    Record,
    TakeCall,
    TakeReply,
)
from worker.redis_url import RedisUrl

COMMAND_TIMEOUT_S = 2.5
"""Less than a lease without the time between renewals: a renewal may time out once."""
MAX_BLOCK_MS = 1500
BLOCKING_TIMEOUT_S = 3.5
"""Exceeds MAX_BLOCK_MS by as much as a reply may take."""
_COMMAND_CONNECTIONS = 32
_BLOCKING_CONNECTIONS = 256

_NO_GROUP = object()
_OWNERSHIP: Mapping[int, Ownership] = {1: "held", 0: "lost", -1: "deleted"}
"""Replies of `renew.lua`."""


class RedisStreams:
    """`Streams` over two redis-py clients, one for commands and one for blocking reads."""

    def __init__(
        self, commands: Redis, blocking: Redis, address: str = "the server", contact: Contact | None = None
    ) -> None:
        self.reconnects = 0
        self.waits_for_access = False
        self.contact = contact or Contact()
        self.documents: Documents = RedisDocuments(commands, address)
        self._commands = commands
        self._blocking = blocking
        self._address = address
        self._opened: weakref.WeakSet[Connection] = weakref.WeakSet()
        of_job = ("take", "append", "cancel", "state")
        of_queue = ("renew", "settle")
        others = ("reclaim", "pending", "enqueue", "find", "position", "depth", "remove_consumers")
        self._scripts = {name: commands.register_script(_lua("job") + _lua(name)) for name in of_job}
        self._scripts |= {name: commands.register_script(_lua("queue") + _lua(name)) for name in of_queue}
        self._scripts |= {name: commands.register_script(_lua(name)) for name in others}

    @classmethod
    def from_url(cls, url: str, contact: Contact | None = None) -> Self:
        """Create clients for `url`; they connect on first use. Raises ConfigInvalid."""
        try:
            parsed = RedisUrl.parse(url)
            parsed.check_files()
        except ValueError as error:
            raise ConfigInvalid(f"redis.url: {error}") from None
        commands = open_client(parsed, _COMMAND_CONNECTIONS, COMMAND_TIMEOUT_S)
        blocking = open_client(parsed, _BLOCKING_CONNECTIONS, BLOCKING_TIMEOUT_S)
        streams = cls(commands, blocking, str(parsed), contact)
        for each in (commands, blocking):
            each.connection_pool.connection_kwargs["redis_connect_func"] = streams._on_connect
        return streams

    async def _on_connect(self, connection: Connection) -> None:
        await connection.on_connect()
        if connection in self._opened:
            self.reconnects += 1
        self._opened.add(connection)

    def _lost(self, call: str, error: Disconnected) -> None:
        """Report a failed call. Without a reply, other connections may be dead as well."""
        for pool in (self._commands.connection_pool, self._blocking.connection_pool):
            if not error.reply and isinstance(pool, WaitingPool):
                pool.suspect_idle()
        self.contact.failed(call, error)

    async def open_queue(self, queue: str) -> None:
        try:
            create = self._commands.xgroup_create(queue_key(queue), GROUP, id="0", mkstream=True)
            await self._call(create, write="open_queue")
        except ServerRefused as error:
            if error.details["reply"] != "BUSYGROUP":  # it exists
                raise

    async def enqueue(self, queue: str, fields: Fields, bound: int) -> str | None:
        args = [bound, *_flat(fields.items())]
        reply = await self._call(self._run_script("enqueue", [queue_key(queue)], args), write="enqueue")
        return None if reply is None else text_of(reply)

    async def read_new(self, queues: Sequence[str], consumer: str, block_ms: int) -> dict[str, Entry]:
        """XREADGROUP of one entry a queue. Pauses if the server returns before the block ends."""
        clock = asyncio.get_running_loop().time
        until, block = clock() + block_ms / 1000, min(block_ms, MAX_BLOCK_MS)
        client, wait = (self._blocking, block) if block > 0 else (self._commands, None)
        read = client.xreadgroup(GROUP, consumer, {queue_key(queue): ">" for queue in queues}, count=1, block=wait)
        reply = await self._call(read, no_group=_NO_GROUP, write="read_new")
        if reply is _NO_GROUP:  # the server lost the group's creation, or was flushed
            for queue in queues:
                await self.open_queue(queue)
            return {}
        of_key = {queue_key(queue): queue for queue in queues}
        found = {
            of_key[text_of(key)]: Entry(entry_id, fields, 1)
            for key, records in reply or ()
            for entry_id, fields in stream_records([(key, records)])
        }
        if not found and (left := until - clock()) > 0:
            await asyncio.sleep(min(left, 0.01))
        return found

    async def read_own(self, queue: str, consumer: str, above: str) -> Entry | None:
        """XPENDING and XRANGE; XREADGROUP with an id would count a delivery."""
        key = queue_key(queue)
        pending = self._commands.xpending_range(key, GROUP, next_id(above), "+", 1, consumername=consumer)
        for row in await self._call(pending, no_group=[]):
            entry_id = text_of(row["message_id"])
            records = await self.range(key, entry_id, entry_id, 1)
            return Entry(entry_id, records[0][1] if records else {}, row["times_delivered"])
        return None

    async def reclaim(self, queue: str, consumer: str, row: PendingEntry) -> Entry | None:
        seen = (row.entry_id, row.consumer, row.deliveries, row.idle_ms)
        fields = await self._on_queue("reclaim", queue, consumer, *seen)
        if not fields:
            return None
        return Entry(row.entry_id, fields_of(dict(zip(fields[::2], fields[1::2], strict=True))), row.deliveries + 1)

    async def renew(self, queue: str, consumer: str, entry_id: str) -> Ownership:
        return _OWNERSHIP[await self._on_queue("renew", queue, consumer, entry_id)]

    async def renew_many(
        self, consumer: str, calls: Sequence[tuple[str, str, str | None]]
    ) -> list[tuple[Ownership, bool] | None]:
        """EVALSHA of `renew.lua` for each and of `state.lua` for each job, in one pipeline."""
        renew, state = self._scripts["renew"].sha, self._scripts["state"].sha
        commands: list[Sequence[Value]] = [
            ("EVALSHA", renew, 2, queue_key(queue), dead_key(queue), GROUP, consumer, entry_id)
            for queue, entry_id, _ in calls
        ]
        jobs = [job_id for _, _, job_id in calls if job_id is not None]
        commands += [("EVALSHA", state, 2, events_key(job_id), state_key(job_id)) for job_id in jobs]
        pipeline = self._pipeline(commands, len(calls))
        replies = await self._call(pipeline, no_group=[], no_script=[], write="renew")
        if not replies:
            return [None] * len(calls)
        states = dict(zip(jobs, replies[len(calls) :], strict=True))
        return [
            _renewal(ownership, states.get(job_id) if job_id is not None else [])
            for ownership, (_, _, job_id) in zip(replies, calls, strict=False)
        ]

    async def give_back(self, queue: str, consumer: str, entry_id: str, idle_ms: int, deliveries: int) -> bool:
        return bool(await self._on_queue("renew", queue, consumer, entry_id, idle_ms, deliveries) == 1)

    async def settle(self, queue: str, entry_id: str, dead: Fields | None, job_id: str | None = None) -> bool:
        return bool(await self._call(self._settle(queue, entry_id, dead, job_id), no_group=True, write="settle"))

    async def _settle(self, queue: str, entry_id: str, dead: Fields | None, job_id: str | None) -> bool:
        """`state.lua` and `settle.lua` on one connection, so without a restart in between."""
        async with self._one_connection() as run_script:
            if job_id is not None:
                _, flat = await run_script("state", [events_key(job_id), state_key(job_id)], ())
                state = texts_of(dict(zip(flat[::2], flat[1::2], strict=True)))
                if state.get("state") not in TERMINAL_KINDS and state.get("entry", entry_id) == entry_id:
                    return False
            args = (GROUP, entry_id, *_flat((dead or {}).items()))
            await run_script("settle", [queue_key(queue), dead_key(queue)], args)
        return True

    async def remove_consumers(self, queue: str, name: str | None, min_idle_ms: int) -> int:
        return int(await self._on_queue("remove_consumers", queue, min_idle_ms, *([name] if name else [])))

    async def _on_queue(self, script: str, queue: str, *args: Value) -> Any:
        keys = [queue_key(queue), dead_key(queue)]
        return await self._call(self._run_script(script, keys, (GROUP, *args)), no_group=0, write=script)

    async def pending(self, queue: str, count: int) -> list[PendingEntry]:
        """XPENDING and the server's clock, read at the same time."""
        reply = await self._on_queue("pending", queue, count)
        if not reply:
            return []
        now_ms = int(reply[0][0]) * 1000 + int(reply[0][1]) // 1000
        return [PendingEntry(text_of(i), text_of(name), idle, n, now_ms - idle) for i, name, idle, n in reply[1]]

    async def job_state(self, job_id: str) -> JobState:
        last_id, fields = await self._on_job("state", job_id)
        return JobState(text_of(last_id), texts_of(dict(zip(fields[::2], fields[1::2], strict=True))))

    async def take(self, job_id: str, call: TakeCall) -> TakeReply:
        owner = (call.entry_id, call.worker, call.expected, call.epoch, call.now_ms, call.ttl_ms)
        counts = (call.deliveries, call.max_deliveries, call.max_attempts)
        events = (*call.opening, call.opening_code, call.cancelled.packed, call.poisoned.packed, call.last_attempt)
        return TakeReply(*map(text_of, await self._on_job("take", job_id, *owner, *counts, *events)))

    async def append(self, job_id: str, call: AppendCall) -> str:
        return text_of(await self._on_job("append", job_id, *_append_args(call)))

    async def append_many(self, calls: Sequence[tuple[str, AppendCall]]) -> list[str | None]:
        """EVALSHA for each in one pipeline; `append` loads a script that the server lacks."""
        sha = self._scripts["append"].sha
        commands: list[Sequence[Value]] = [
            ("EVALSHA", sha, 2, events_key(job_id), state_key(job_id), *_append_args(call)) for job_id, call in calls
        ]
        pipeline = self._pipeline(commands, len(calls))
        replies = await self._call(pipeline, no_script=[None] * len(calls), write="append")
        return [text_of(reply) if isinstance(reply, bytes) else None for reply in replies]

    async def _pipeline(self, commands: Sequence[Sequence[Value]], writes: int) -> list[Any]:
        """Replies to commands sent in one write, errors included.

        Raises the first error if the replies to the first `writes` commands are errors. The others
        only read: a server that refuses writes executes them.
        """
        pool = self._commands.connection_pool
        if isinstance(pool, WaitingPool):
            replies = await pool.exchange(b"".join(map(pack_command, commands)), len(commands))
        else:  # a client that `open_client` has not made
            async with self._commands.pipeline(transaction=False) as pipe:
                for command in commands:
                    pipe.execute_command(*command)
                replies = await pipe.execute(raise_on_error=False)
        raise_if_all_failed(replies[:writes])
        return replies

    async def _run_script(self, name: str, keys: Sequence[str], args: Sequence[Value]) -> Any:
        """EVALSHA; redis-py loads a script that the server lacks, and EVALs for other clients."""
        pool, script = self._commands.connection_pool, self._scripts[name]
        if isinstance(pool, WaitingPool):
            command = pack_command(("EVALSHA", script.sha, len(keys), *keys, *args))
            (reply,) = await pool.exchange(command, 1)
            if not isinstance(reply, exceptions.ResponseError):
                return reply
            if code_of(reply) != "NOSCRIPT":
                raise reply
        return await script(keys=keys, args=args)

    @contextlib.asynccontextmanager
    async def _one_connection(self) -> AsyncIterator[Callable[[str, Sequence[str], Sequence[Value]], Awaitable[Any]]]:
        """As `_run_script`, for several calls on a connection that is not replaced between them."""
        pool = self._commands.connection_pool
        if not isinstance(pool, WaitingPool):
            yield self._run_script
            return
        async with pool.connection() as connection:

            async def run_script(name: str, keys: Sequence[str], args: Sequence[Value]) -> Any:
                script = self._scripts[name]
                run, load = ("EVALSHA", script.sha, len(keys), *keys, *args), ("SCRIPT", "LOAD", str(script.script))
                (reply,) = await connection.exchange(pack_command(run), 1)
                if isinstance(reply, exceptions.ResponseError) and code_of(reply) == "NOSCRIPT":
                    loaded, reply = await connection.exchange(pack_command(load) + pack_command(run), 2)
                    raise_if_all_failed([loaded])
                raise_if_all_failed([reply])
                return reply

            yield run_script

    async def cancel(self, job_id: str, call: CancelCall) -> str:
        args = (call.expected, call.epoch, call.now_ms, call.ttl_ms, *call.event)
        return text_of(await self._on_job("cancel", job_id, *args))

    async def _on_job(self, script: str, job_id: str, *args: Value) -> Any:
        keys = [events_key(job_id), state_key(job_id)]
        return await self._call(self._run_script(script, keys, args), write=script)

    async def expire_job(self, job_id: str, ttl_ms: int) -> None:
        async with self._commands.pipeline(transaction=False) as pipe:
            for key in (events_key(job_id), state_key(job_id)):
                pipe.pexpire(key, ttl_ms, lt=True)
            await self._call(pipe.execute(), write="expire_job")

    async def add(self, key: str, fields: Fields, keep: int, ttl_ms: int | None) -> str:
        add = self._commands.xadd(key, dict(fields.items()), maxlen=keep, approximate=True)
        entry_id = await self._call(add, write="add")
        if ttl_ms is not None:
            await self._call(self._commands.pexpire(key, ttl_ms))
        return text_of(entry_id)

    async def read(self, key: str, after: str, block_ms: int, count: int = 100) -> list[Record]:
        block = min(block_ms, MAX_BLOCK_MS)
        client, wait = (self._blocking, block) if block > 0 else (self._commands, None)
        return stream_records(await self._call(client.xread({key: after}, count=count, block=wait)))

    async def read_many(self, after: Mapping[str, str], block_ms: int, count: int) -> dict[str, list[Record]]:
        reply = await self._call(self._xread(after, min(block_ms, MAX_BLOCK_MS), count))
        return {text_of(stream[0]): stream_records([stream]) for stream in reply or ()}

    async def _xread(self, after: Mapping[str, str], block_ms: int, count: int) -> Any:
        pool = self._blocking.connection_pool
        if not isinstance(pool, WaitingPool):  # a client that `open_client` has not made
            positions: dict[Any, Any] = dict(after)
            return await self._blocking.xread(positions, count=count, block=block_ms)
        command = pack_command(("XREAD", "COUNT", count, "BLOCK", block_ms, "STREAMS", *after, *after.values()))
        (reply,) = await pool.exchange(command, 1)
        if isinstance(reply, exceptions.ResponseError):
            raise reply
        return reply

    async def find(self, queue: str, job_id: str, first: str, count: int) -> tuple[str | None, list[Record]]:
        last, found = await self._call(self._run_script("find", [queue_key(queue)], (job_id, first, count)))
        records: list[Record] = [
            (text_of(i), fields_of(dict(zip(flat[::2], flat[1::2], strict=True)))) for i, flat in found
        ]
        return next_id(text_of(last)) if last else None, records

    async def position(self, queue: str, text: str, count: int) -> tuple[int, int] | None:
        found = await self._on_queue("position", queue, text, count)
        return (int(found[0]), int(found[1])) if found else None

    async def depth(self, queue: str, lease_ms: int) -> QueueDepth:
        return QueueDepth(*await self._on_queue("depth", queue, lease_ms))

    async def length(self, key: str) -> int:
        return int(await self._call(self._commands.xlen(key)))

    async def range(self, key: str, first: str, last: str, count: int) -> list[Record]:
        records = await self._call(self._commands.xrange(key, first, last, count))
        return [(text_of(entry_id), fields_of(fields)) for entry_id, fields in records]

    async def last_id(self, key: str) -> str:
        """`last-generated-id` of XINFO STREAM, which trimming does not change."""
        try:
            return text_of((await self._call(self._commands.xinfo_stream(key)))["last-generated-id"])
        except ServerRefused as error:
            if "no such key" not in error.message:
                raise
            return START

    async def delete(self, key: str, entry_id: str) -> bool:
        return bool(await self._call(self._commands.xdel(key, entry_id)))

    async def put_status(self, worker: str, status: Mapping[str, str], ttl_ms: int) -> None:
        """Write the status hash and the registry; members without a heartbeat are removed later."""
        key, now = worker_key(worker), await self.time_ms()
        async with self._commands.pipeline(transaction=True) as pipe:
            pipe.hset(key, mapping=dict(status.items()))
            pipe.pexpire(key, ttl_ms)
            await self._call(pipe.execute(), write="put_status")
        await self._call(self._commands.zadd(WORKERS, {worker: now}))
        await self._call(self._commands.zremrangebyscore(WORKERS, "-inf", now - 10 * ttl_ms))

    async def drop_status(self, worker: str) -> None:
        await self._call(self._commands.zrem(WORKERS, worker))
        await self._call(self._commands.delete(worker_key(worker)))

    async def workers(self) -> dict[str, Mapping[str, str]]:
        """A time to live above STATUS_TTL_MS is a dead worker's: the clock went back."""
        names = [text_of(name) for name in await self._call(self._commands.zrange(WORKERS, 0, -1))]
        async with self._commands.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hgetall(worker_key(name))
                pipe.pttl(worker_key(name))
            replies = await self._call(pipe.execute())
        listed = zip(names, replies[::2], replies[1::2], strict=True)
        return {name: texts_of(status) for name, status, ttl_ms in listed if status and ttl_ms <= STATUS_TTL_MS}

    async def time_ms(self) -> int:
        seconds, micros = await self._call(self._commands.time())
        return int(seconds) * 1000 + int(micros) // 1000

    async def close(self) -> None:
        await self._commands.aclose()
        await self._blocking.aclose()

    async def _call(self, reply: Awaitable[Any], no_group: Any = None, no_script: Any = None, write: str = "") -> Any:
        """Await the reply; return `no_group` if the queue has no consumer group.

        `no_script`, if not None, is returned if the server lacks a script; `Contact` then records
        neither a failure nor a success. `write` names a call that writes, for `Contact`.

        Raises Disconnected and ServerRefused. A cancellation that arrives with the reply is raised:
        `wait_for` of Python 3.11, used by redis-py, would drop it.
        """
        task, began_s = asyncio.current_task(), time.monotonic()
        cancellations = task.cancelling() if task else 0
        try:
            value = await reply
        except exceptions.RedisError as error:
            code = code_of(error)
            if code == "NOGROUP":
                return no_group
            if code == "NOSCRIPT" and no_script is not None:
                return no_script
            translated = translate(error, self._address, waiting=self.waits_for_access)
            if isinstance(translated, Disconnected):
                self._lost(write, translated)
            raise translated from error
        finally:
            if task and task.cancelling() > cancellations:
                raise asyncio.CancelledError
        self.contact.succeeded(write, began_s)
        return value


def _append_args(call: AppendCall) -> list[Value]:
    """ARGV of `append.lua`."""
    expected, epoch, worker, taken_ms, state, tokens, code, events, now_ms, ttl_ms, base_attempt = call
    args: list[Value] = [expected, epoch, worker, taken_ms, state, tokens, code, now_ms, ttl_ms, base_attempt]
    for entry_id, (kind, packed) in events:
        args += (entry_id, kind, packed)
    return args


def _renewal(reply: Any, state: Any) -> tuple[Ownership, bool] | None:
    """The result of `renew_many` from the replies of `renew.lua` and, if called, `state.lua`."""
    if isinstance(reply, exceptions.RedisError) or isinstance(state, exceptions.RedisError):
        return None
    fields = state[1][::2] if state else []
    return _OWNERSHIP[reply], b"cancel" in fields


def _lua(name: str) -> str:
    return (resources.files("worker.jobs") / "lua" / f"{name}.lua").read_text()


def _flat(rows: Iterable[tuple[Value, ...]]) -> list[Value]:
    return list(chain.from_iterable(rows))
