"""Repeats explored calls on a real server, and compares replies and states with the model's.

The server of the model is a tree of calls from the first state. Each path of the tree is replayed
from an empty server, by `RedisStreams` with the Lua scripts that workers use.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from redis.asyncio import Redis

from tests.jobs.memory_streams import MemoryStreams
from tests.protocol_model.automaton import Call
from tests.protocol_model.explorer import Explorer
from tests.protocol_model.programs import JOB, QUEUE
from tests.protocol_model.traces import describe
from worker.jobs.keys import dead_key, events_key, queue_key
from worker.jobs.redis_streams import RedisStreams
from worker.jobs.streams import PendingEntry

Edge = tuple[int, int]
"""A state of the model's server, and a call."""


def differences(
    explorer: Explorer,
    url: str,
    connect: Callable[[str], RedisStreams] = RedisStreams.from_url,
    at_most: int | None = None,
) -> tuple[int, list[str]]:
    """Compare calls of the explored states, evenly chosen if `at_most` of them are to be compared.

    Returns how many were compared, those on the paths to them included, and what differs.
    """
    edges = sorted(explorer.server.edges)
    step = 1 if at_most is None else max(1, len(edges) // at_most)
    return asyncio.run(_Replay(explorer, url, connect).run(edges[::step]))


class _Replay:
    def __init__(self, explorer: Explorer, url: str, connect: Callable[[str], RedisStreams]) -> None:
        self._explorer = explorer
        self._url = url
        self._connect = connect
        self._compared = 0
        self._found: list[str] = []

    async def run(self, edges: Iterable[Edge]) -> tuple[int, list[str]]:
        """Replay the path to each edge and the edge; edges that change nothing share a path."""
        self._raw, self._streams = Redis.from_url(self._url, protocol=2), self._connect(self._url)
        await self._streams.open_queue(QUEUE)
        calls: dict[int, list[int]] = defaultdict(list)
        for node, call in edges:
            calls[node].append(call)
        for node in sorted(calls):
            unchanged = [call for call in calls[node] if self._explorer.server.edges[node, call][0] == node]
            changing = [call for call in calls[node] if self._explorer.server.edges[node, call][0] != node]
            if unchanged:
                await self._replay([*self._path(node), *((node, call) for call in unchanged)])
            for call in changing:
                await self._replay([*self._path(node), (node, call)])
        await self._streams.close()
        await self._raw.aclose()
        return self._compared, self._found

    def _path(self, node: int) -> list[Edge]:
        path: list[Edge] = []
        while node != self._explorer.server.first:
            path.append(self._explorer.server.reached_by[node])
            node = path[-1][0]
        return path[::-1]

    async def _replay(self, path: list[Edge]) -> None:
        """Make the calls on an empty server, and compare the replies, and the state after the last."""
        await self._raw.flushall()
        await self._streams.open_queue(QUEUE)
        after = self._explorer.server.first
        for node, number in path:
            call: Call = self._explorer.values.value(number)
            after, reply = self._explorer.server.edges[node, number]
            expected = self._explorer.values.value(reply)
            received = await self._make(call, expected)
            self._compared += 1
            if _timeless(received) != _timeless(expected):
                self._report(path, f"replied {describe(received)}, expected {describe(expected)}")
                return
        expected = await _state(self._explorer.server.streams(after))
        received = await self._real_state()
        if expected != received:
            self._report(path, f"state {received}, expected {expected}")

    async def _make(self, call: Call, expected: Any) -> Any:
        if call.name == "enqueue":  # with the model's id, not the server's clock
            queue, fields, _ = call.args
            return (await self._raw.xadd(queue_key(queue), dict(fields.items()), id=expected)).decode()
        if call.name == "give_back":
            queue, consumer, entry_id, _, deliveries = call.args
            return await self._streams.give_back(queue, consumer, entry_id, 60_000, deliveries)
        return await getattr(self._streams, call.name)(*map(_lengthened, call.args))

    def _report(self, path: list[Edge], problem: str) -> None:
        calls = [describe(self._explorer.values.value(call)) for _, call in path]
        self._found.append("\n".join(["a real server differs:", *(f"  {call}" for call in calls), f"  {problem}"]))

    async def _real_state(self) -> dict[str, Any]:
        """As `_state`."""
        state = await _state(self._streams)
        delivered = [group["last-delivered-id"].decode() for group in await self._raw.xinfo_groups(queue_key(QUEUE))]
        return state | {"delivered": delivered[0]}


def _lengthened(argument: Any) -> Any:
    """The idle time of an entry that was given back, 1 ms in the model, as a minute.

    A renewed entry has a shorter one on a server whose clock runs, too.
    """
    if isinstance(argument, PendingEntry) and argument.idle_ms:
        return replace(argument, idle_ms=60_000)
    return argument


def _timeless(reply: Any) -> Any:
    """A reply without idle times and times of delivery."""
    if isinstance(reply, PendingEntry):
        return replace(reply, idle_ms=0, delivered_ms=0)
    return [_timeless(each) for each in reply] if isinstance(reply, list) else reply


async def _state(streams: MemoryStreams | RedisStreams) -> dict[str, Any]:
    """All that a server keeps for the job, read by the calls of `Streams`, without times."""
    job = await streams.job_state(JOB)
    queue = queue_key(QUEUE)
    dead = await streams.range(dead_key(QUEUE), "-", "+", 100)
    found: dict[str, Any] = {
        "events": await streams.range(events_key(JOB), "-", "+", 100),
        "state": dict(job.fields),
        "last id": job.last_id,
        "queue": await streams.range(queue, "-", "+", 100),
        "pending": _timeless(await streams.pending(QUEUE, 100)),
        "dead letters": [fields for _, fields in dead],
    }
    if isinstance(streams, MemoryStreams):
        found["delivered"] = streams._streams[queue].delivered
    return found
