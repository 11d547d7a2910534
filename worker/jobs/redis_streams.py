"""`Streams` on Redis 7.0 or later, and Valkey: single commands, and `lua/` for the rest.

Blocking reads use connections of their own, whose time-out is longer than any block. No call is
retried here: the caller must know when a reply was lost. `redis_server.py` has servers and
clusters, `redis_errors.py` the exceptions.
"""

import asyncio
import logging
import time
import weakref
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Self

from redis import exceptions
from redis.asyncio.connection import AbstractConnection

from worker.errors import ConfigInvalid, ServerRefused
from worker.jobs.documents import Documents, response_key
from worker.jobs.events import TERMINAL_KINDS
from worker.jobs.keys import GROUP, START, WORKERS, dead_key, events_key, next_id, queue_key, state_key, worker_key
from worker.jobs.redis_commands import keys_of
from worker.jobs.redis_documents import RedisDocuments
from worker.jobs.redis_errors import code_of, translate
from worker.jobs.redis_open import open_server
from worker.jobs.redis_replies import (
    fields_of,
    flat,
    ms_of,
    overview_of,
    pending_entries,
    records_of,
    streams_of,
    text_of,
    texts_of,
)
from worker.jobs.redis_resp import Command, Value
from worker.jobs.redis_scripts import load_scripts
from worker.jobs.redis_server import MAX_BLOCK_MS, Exchange, Server, checked, run, run_transaction
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
    QueueOverview,
    Record,
    TakeCall,
    TakeReply,
)
from worker.redis_url import RedisUrl

POLL_MS = 20
"""Interval of reads of streams in different slots of a cluster, which no call can wait for."""
CLUSTER_READERS = 128
"""Readers of a cluster that wait in a call of their own, before they poll together."""

_WAIT: Command = ("WAIT", 1, 500)
"""Until a replica has the connection's last write, or for 500 ms."""
OVERVIEW_BYTES = 2**20
_MAX_LOGGED = 10
"""Malformed statuses that one call logs: the registry may hold any number."""

_NO_GROUP = object()
_OWNERSHIP: Mapping[int, Ownership] = {1: "held", 0: "lost", -1: "deleted"}
"""Replies of `renew.lua`."""
_STALE = ("", "READONLY", "MASTERDOWN", "UNBLOCKED")
"""Replies, or their absence, after which another server may be the master."""


class RedisStreams:
    """`Streams` over a server or a cluster."""

    def __init__(self, server: Server, address: str = "the server", contact: Contact | None = None) -> None:
        self.reconnects = 0
        self.waits_for_access = False
        self.max_separate_reads = CLUSTER_READERS if server.clustered else 0
        self.contact = contact or Contact()
        self.documents: Documents = RedisDocuments(server, address)
        self._server = server
        self._address = address
        self._replied = False
        """Whether a call has succeeded."""
        self._malformed: frozenset[str] = frozenset()
        """Workers whose status has another type."""
        self._opened: weakref.WeakSet[AbstractConnection] = weakref.WeakSet()
        self._scripts = load_scripts()

    @classmethod
    def from_url(cls, url: str | RedisUrl, contact: Contact | None = None) -> Self:
        """Create the connections of `url`; they open on first use. Raises ConfigInvalid."""
        try:
            parsed = RedisUrl.parse(url) if isinstance(url, str) else url
            parsed.check_files()
        except ValueError as error:
            raise ConfigInvalid(f"redis.url: {error}") from None

        async def on_connect(connection: AbstractConnection) -> None:
            await connection.on_connect()
            if connection in streams._opened:
                streams.reconnects += 1
            streams._opened.add(connection)

        def on_failover() -> None:
            streams.reconnects += 1

        streams = cls(open_server(parsed, on_connect, on_failover), str(parsed), contact)
        return streams

    def _lost(self, call: str, error: Disconnected) -> None:
        """Report a failed call. Without a reply, other connections may be dead as well."""
        if error.reply in _STALE:
            self._server.suspect_idle()
        self.contact.failed(call, error)

    async def _run(self, *command: Value, blocking: bool = False, no_group: Any = None) -> Any:
        """The reply to one command, which `Contact` knows by its name and first key."""
        name = " ".join([str(command[0]), *keys_of(command)])
        return await self._call(name, run(self._server, *command, blocking=blocking), no_group)

    async def open_queue(self, queue: str) -> None:
        try:
            await self._run("XGROUP", "CREATE", queue_key(queue), GROUP, "0", "MKSTREAM")
        except ServerRefused as error:
            if error.details["reply"] != "BUSYGROUP":  # it exists
                raise

    async def enqueue(self, queue: str, fields: Fields, bound: int) -> str | None:
        args = [bound, *flat(fields.items())]
        reply = await self._call("enqueue", self._run_script("enqueue", [queue_key(queue)], args))
        return None if reply is None else text_of(reply)

    async def read_new(self, queues: Sequence[str], consumer: str, block_ms: int) -> dict[str, Entry]:
        """XREADGROUP of one entry a queue. Pauses if the server returns before the block ends."""
        if self._server.clustered and len(queues) > 1:
            return await self._read_new_in_turn(queues, consumer, block_ms)
        clock = asyncio.get_running_loop().time
        until, block = clock() + block_ms / 1000, min(block_ms, MAX_BLOCK_MS)
        options = ("BLOCK", block) if block > 0 else ()
        keys, ids = map(queue_key, queues), [">"] * len(queues)
        command = ("XREADGROUP", "GROUP", GROUP, consumer, "COUNT", 1, *options, "STREAMS", *keys, *ids)
        reply = await self._run(*command, blocking=block > 0, no_group=_NO_GROUP)
        if reply is _NO_GROUP:  # the server lost the group's creation, or was flushed
            for queue in queues:
                await self.open_queue(queue)
            return {}
        records = streams_of(reply)
        found = {queue: Entry(*records[queue_key(queue)][0], 1) for queue in queues if records.get(queue_key(queue))}
        if not found and (left := until - clock()) > 0:
            await asyncio.sleep(min(left, 0.01))
        return found

    async def _read_new_in_turn(self, queues: Sequence[str], consumer: str, block_ms: int) -> dict[str, Entry]:
        """Read queues in different slots: wait `POLL_MS` for the first, and look at the others."""
        clock = asyncio.get_running_loop().time
        until = clock() + block_ms / 1000
        while True:
            wait_ms = min(POLL_MS, int(1000 * (until - clock())))
            for queue in queues:
                found = await self.read_new([queue], consumer, max(0, wait_ms) if queue == queues[0] else 0)
                if found:
                    return found
            if clock() >= until:
                return {}

    async def read_own(self, queue: str, consumer: str, above: str) -> Entry | None:
        """XPENDING and XRANGE; XREADGROUP with an id would count a delivery."""
        key = queue_key(queue)
        pending = await self._run("XPENDING", key, GROUP, next_id(above), "+", 1, consumer, no_group=[])
        for entry, _, _, deliveries in pending:
            entry_id = text_of(entry)
            records = await self.range(key, entry_id, entry_id, 1)
            return Entry(entry_id, records[0][1] if records else {}, deliveries)
        return None

    async def reclaim(self, queue: str, consumer: str, row: PendingEntry) -> Entry | None:
        seen = (row.entry_id, row.consumer, row.deliveries, row.idle_ms)
        fields = await self._on_queue("reclaim", queue, consumer, *seen)
        if not fields:
            return None
        return Entry(row.entry_id, fields_of(fields), row.deliveries + 1)

    async def renew(self, queue: str, consumer: str, entry_id: str) -> Ownership:
        return _OWNERSHIP[await self._on_queue("renew", queue, consumer, entry_id)]

    async def renew_many(
        self, consumer: str, calls: Sequence[tuple[str, str, str | None]]
    ) -> list[tuple[Ownership, bool] | None]:
        """EVALSHA of `renew.lua` for each and of `state.lua` for each job, in one pipeline."""
        renew, state = self._scripts["renew"], self._scripts["state"]
        commands = [renew.call([queue_key(queue)], (GROUP, consumer, entry_id)) for queue, entry_id, _ in calls]
        jobs = [job_id for _, _, job_id in calls if job_id is not None]
        commands += [state.call(_job_keys(job_id), ()) for job_id in jobs]
        pipeline = self._pipeline(commands, len(calls))
        replies = await self._call("renew", pipeline, no_group=[], no_script=[])
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
        return bool(await self._call("settle", self._settle(queue, entry_id, dead, job_id), no_group=True))

    async def _settle(self, queue: str, entry_id: str, dead: Fields | None, job_id: str | None) -> bool:
        """`state.lua` and `settle.lua` on one connection, so without a restart in between."""
        async with self._server.session() as session:
            if job_id is not None:
                _, reply = await self._run_script("state", _job_keys(job_id), (), session)
                state = texts_of(reply)
                if state.get("state") not in TERMINAL_KINDS and state.get("entry", entry_id) == entry_id:
                    return False
            keys = [queue_key(queue), dead_key(queue)] if dead else [queue_key(queue)]
            await self._run_script("settle", keys, (GROUP, entry_id, *flat((dead or {}).items())), session)
        return True

    async def remove_consumers(self, queue: str, name: str | None, min_idle_ms: int) -> int:
        return int(await self._on_queue("remove_consumers", queue, min_idle_ms, *([name] if name else [])))

    async def _on_queue(self, script: str, queue: str, *args: Value) -> Any:
        """One key: while a cluster moves a slot, scripts need all of their keys to exist."""
        call = self._run_script(script, [queue_key(queue)], (GROUP, *args))
        return await self._call(script, call, no_group=0)

    async def pending(self, queue: str, count: int) -> list[PendingEntry]:
        """XPENDING and the server's clock, read at the same time."""
        reply = await self._on_queue("pending", queue, count)
        if not reply:
            return []
        return pending_entries(ms_of(reply[0]), reply[1])

    async def job_state(self, job_id: str) -> JobState:
        last_id, fields = await self._on_job("state", job_id)
        return JobState(text_of(last_id), texts_of(fields))

    async def take(self, job_id: str, call: TakeCall) -> TakeReply:
        owner = (call.entry_id, call.worker, call.expected, call.epoch, call.now_ms, call.ttl_ms)
        counts = (call.deliveries, call.max_deliveries, call.max_attempts)
        events = (*call.opening, call.opening_code, call.cancelled.packed, call.poisoned.packed, call.last_attempt)
        return TakeReply(*map(text_of, await self._on_job("take", job_id, *owner, *counts, *events)))

    async def append(self, job_id: str, call: AppendCall) -> str:
        """WAIT follows a job's end on a cluster: settling its entry must not outlast the end."""
        after = [_WAIT] if call.state in TERMINAL_KINDS and self._server.fails_over_alone(events_key(job_id)) else []
        run_script = self._run_script("append", _job_keys(job_id), _append_args(call), after=after)
        return text_of(await self._call("append", run_script))

    async def append_many(self, calls: Sequence[tuple[str, AppendCall]]) -> list[str | None]:
        """EVALSHA for each in one pipeline; `append` loads a script that the server lacks."""
        append = self._scripts["append"]
        commands = [append.call(_job_keys(job_id), _append_args(call)) for job_id, call in calls]
        pipeline = self._pipeline(commands, len(calls))
        replies = await self._call("append", pipeline, no_script=[None] * len(calls))
        return [text_of(reply) if isinstance(reply, bytes) else None for reply in replies]

    async def _pipeline(self, commands: Sequence[Command], writes: int) -> list[Any]:
        """Replies to commands sent together, errors included.

        Raises the first error if the replies to the first `writes` commands are errors. The others
        only read: a server that refuses writes executes them.
        """
        replies = await self._server.exchange(commands)
        if writes and all(isinstance(reply, exceptions.RedisError) for reply in replies[:writes]):
            checked(replies[0], commands[0])
        return replies

    async def _run_script(
        self,
        name: str,
        keys: Sequence[str],
        args: Sequence[Value],
        server: Exchange | None = None,
        after: Sequence[Command] = (),
    ) -> Any:
        """EVALSHA, after SCRIPT LOAD if the server lacks the script, and commands `after` it."""
        server, script = server or self._server, self._scripts[name]
        call = script.call(keys, args)
        reply, *_ = await (server.exchange_at(keys[0], [call, *after]) if after else server.exchange([call]))
        if isinstance(reply, exceptions.ResponseError) and code_of(reply) == "NOSCRIPT":
            load = ("SCRIPT", "LOAD", script.source)
            loaded, reply, *_ = await server.exchange_at(keys[0], [load, call, *after])
            checked(loaded, load)
        return checked(reply, call)

    async def cancel(self, job_id: str, call: CancelCall) -> str:
        args = (call.expected, call.epoch, call.now_ms, call.ttl_ms, *call.event)
        return text_of(await self._on_job("cancel", job_id, *args))

    async def _on_job(self, script: str, job_id: str, *args: Value) -> Any:
        return await self._call(script, self._run_script(script, _job_keys(job_id), args))

    async def expire_job(self, job_id: str, ttl_ms: int) -> None:
        async def expire() -> None:
            commands = [("PEXPIRE", key, ttl_ms, "LT") for key in _job_keys(job_id)]
            for reply, command in zip(await self._server.exchange(commands), commands, strict=True):
                checked(reply, command)

        await self._call("expire_job", expire())

    async def check_writes(self) -> None:
        """SET a key only if it exists, which it never does: no job has an empty id.

        SET has no wrong type, and only gateways may write this key. On a cluster, at one node.
        """
        await self._run("SET", response_key(""), "", "XX")

    async def add(self, key: str, fields: Fields, keep: int, ttl_ms: int | None) -> str:
        entry_id = await self._run("XADD", key, "MAXLEN", "~", keep, "*", *flat(fields.items()))
        if ttl_ms is not None:
            await self._run("PEXPIRE", key, ttl_ms)
        return text_of(entry_id)

    async def read(self, key: str, after: str, block_ms: int, count: int = 100) -> list[Record]:
        return (await self._xread({key: after}, min(block_ms, MAX_BLOCK_MS), count)).get(key, [])

    async def read_many(self, after: Mapping[str, str], block_ms: int, count: int) -> dict[str, list[Record]]:
        if not self._server.clustered or len(after) == 1:
            return await self._xread(after, min(block_ms, MAX_BLOCK_MS), count)
        until_s = time.monotonic() + min(block_ms, MAX_BLOCK_MS) / 1000
        commands = [("XREAD", "COUNT", count, "STREAMS", key, entry_id) for key, entry_id in after.items()]
        while True:
            found: dict[str, list[Record]] = await self._call("XREAD", self._poll(commands))
            if found or (left_s := until_s - time.monotonic()) <= 0:
                return found
            await asyncio.sleep(min(POLL_MS / 1000, left_s))

    async def _poll(self, commands: Sequence[Command]) -> dict[str, list[Record]]:
        """The entries of streams in different slots. Raises the first error if there are none."""
        replies = await self._server.exchange(commands)
        failed = [isinstance(reply, exceptions.RedisError) for reply in replies]
        found = {
            key: records
            for reply in replies
            if not isinstance(reply, exceptions.RedisError)
            for key, records in streams_of(reply).items()
        }
        if not found and any(failed):
            checked(replies[failed.index(True)], commands[failed.index(True)])
        return found

    async def _xread(self, after: Mapping[str, str], block_ms: int, count: int) -> dict[str, list[Record]]:
        options = ("BLOCK", block_ms) if block_ms > 0 else ()
        command = ("XREAD", "COUNT", count, *options, "STREAMS", *after, *after.values())
        return streams_of(await self._run(*command, blocking=block_ms > 0))

    async def find(self, queue: str, job_id: str, first: str, count: int) -> tuple[str | None, list[Record]]:
        last, found = await self._call("find", self._run_script("find", [queue_key(queue)], (job_id, first, count)))
        return next_id(text_of(last)) if last else None, records_of(found)

    async def position(self, queue: str, text: str, count: int) -> tuple[int, int] | None:
        found = await self._on_queue("position", queue, text, count)
        return (int(found[0]), int(found[1])) if found else None

    async def depth(self, queue: str, lease_ms: int) -> QueueDepth:
        waiting, running, oldest_wait_ms = await self._on_queue("depth", queue, lease_ms)
        dead = await self._call("depth", run(self._server, "XLEN", dead_key(queue)))
        return QueueDepth(waiting, running, oldest_wait_ms, int(dead))

    async def overview(self, queue: str, lease_ms: int, above: str | None, limit: int) -> QueueOverview:
        return overview_of(await self._on_queue("overview", queue, lease_ms, above or "", limit, OVERVIEW_BYTES))

    async def length(self, key: str) -> int:
        return int(await self._run("XLEN", key))

    async def range(self, key: str, first: str, last: str, count: int) -> list[Record]:
        return records_of(await self._run("XRANGE", key, first, last, "COUNT", count))

    async def last_id(self, key: str) -> str:
        """`last-generated-id` of XINFO STREAM, which trimming does not change."""
        try:
            info = await self._run("XINFO", "STREAM", key)
        except ServerRefused as error:
            if "no such key" not in error.message:
                raise
            return START
        return text_of(info[info.index(b"last-generated-id") + 1])

    async def delete(self, key: str, entry_id: str) -> bool:
        return bool(await self._run("XDEL", key, entry_id))

    async def put_status(self, worker: str, status: Mapping[str, str], ttl_ms: int) -> None:
        """Write the status hash and the registry; members without a heartbeat are removed later."""
        key, now = worker_key(worker), await self.time_ms()
        put = run_transaction(self._server, ("HSET", key, *flat(status.items())), ("PEXPIRE", key, ttl_ms))
        await self._call("put_status", put)
        await self._run("ZADD", WORKERS, now, worker)
        await self._run("ZREMRANGEBYSCORE", WORKERS, "-inf", now - 10 * ttl_ms)

    async def drop_status(self, worker: str) -> None:
        await self._run("ZREM", WORKERS, worker)
        await self._run("DEL", worker_key(worker))

    async def workers(self) -> dict[str, Mapping[str, str]]:
        """A time to live above STATUS_TTL_MS is a dead worker's: the clock went back.

        A status of another type is left out and logged: who may register may write such a key.
        """
        names = [text_of(name) for name in await self._run("ZRANGE", WORKERS, 0, -1)]
        listed = await self._call("HGETALL", self._statuses(names)) if names else []
        malformed = frozenset(name for name, status, _ in listed if isinstance(status, exceptions.RedisError))
        for name in sorted(malformed - self._malformed)[:_MAX_LOGGED]:
            logging.getLogger(__name__).warning("worker %r is not listed: %s is no hash", name, worker_key(name))
        self._malformed = malformed
        statuses = {name: status for name, status, ttl_ms in listed if status and ttl_ms <= STATUS_TTL_MS}
        return {name: texts_of(status) for name, status in statuses.items() if name not in malformed}

    async def _statuses(self, names: Sequence[str]) -> list[tuple[str, Any, int]]:
        """Status hash, or the error WRONGTYPE, and time to live of each worker."""
        commands = [(command, worker_key(name)) for name in names for command in ("HGETALL", "PTTL")]
        replies = await self._server.exchange(commands)
        for reply, command in zip(replies, commands, strict=True):
            if not (isinstance(reply, exceptions.RedisError) and code_of(reply) == "WRONGTYPE"):
                checked(reply, command)
        return list(zip(names, replies[::2], replies[1::2], strict=True))

    async def time_ms(self) -> int:
        return ms_of(await self._run("TIME"))

    async def close(self) -> None:
        await self._server.close()

    async def _call(self, name: str, reply: Awaitable[Any], no_group: Any = None, no_script: Any = None) -> Any:
        """Await the reply; return `no_group` if the queue has no consumer group.

        `no_script`, if not None, is returned if the server lacks a script; `Contact`, which knows
        the call by `name`, then records neither a failure nor a success.

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
            translated = translate(error, self._address, waiting=self.waits_for_access, replied=self._replied)
            if isinstance(translated, Disconnected):
                self._lost(name, translated)
            raise translated from error
        finally:
            if task and task.cancelling() > cancellations:
                raise asyncio.CancelledError
        self._replied = True
        self.contact.succeeded(name, began_s)
        return value


def _job_keys(job_id: str) -> list[str]:
    return [events_key(job_id), state_key(job_id)]


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
