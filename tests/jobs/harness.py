"""One interface to the three servers under test: in memory, fakeredis, a real process.

A harness creates transports and clients with connections of their own, as separate processes have
them, and inspects and changes keys directly.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import fakeredis
from redis.asyncio import Redis, RedisCluster
from redis.exceptions import ResponseError

from tests.jobs.cluster import ClusterServer
from tests.jobs.memory_streams import MemoryStreams
from tests.jobs.stream_checker import assert_none, find_violations, keys_without_ttl
from worker.config import LeaseSection
from worker.jobs.client import Client
from worker.jobs.redis_resp import Command
from worker.jobs.redis_streams import RedisStreams
from worker.jobs.streams import Disconnected, Streams
from worker.jobs.transport import Transport


def lease_settings(**settings: Any) -> LeaseSection:
    """Lease settings without validation, which allows a lease of 0 s."""
    return LeaseSection.model_construct(**settings)


SHORT_LEASE = lease_settings(lease_s=0.1, scan_s=0.05)
"""Short enough for tests to wait for."""
NO_LEASE = lease_settings(lease_s=0.0, scan_s=0.02)
"""Every pending entry can be reclaimed at once, as if its consumer had been paused."""
LONG_LEASE = lease_settings(lease_s=60.0, scan_s=0.02)
"""No entry is reclaimed."""


async def wait_until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < deadline, f"{condition} is not true after {timeout_s} s"
        await asyncio.sleep(0.005)


async def assert_consistent(harness: Harness, **texts: str | None) -> None:
    """Check these jobs' streams and texts, that nothing is pending, and that keys expire."""
    assert_none(await find_violations(harness.connect(), "default", texts))
    assert_none(keys_without_ttl(await harness.keys()))


class Harness(ABC):
    """Base class of the three."""

    def __init__(self) -> None:
        self._opened: list[Streams] = []

    def connect(self) -> Streams:
        streams = self._connect()
        self._opened.append(streams)
        return streams

    @abstractmethod
    def _connect(self) -> Streams:
        """A new connection."""

    async def transport(self, name: str, lease: LeaseSection = LONG_LEASE, streams: Streams | None = None) -> Transport:
        transport = Transport(streams or self.connect(), name, lease=lease)
        await transport.open()
        return transport

    def client(self, **options: Any) -> Client:
        return Client(self.connect(), **options)

    @abstractmethod
    async def keys(self) -> dict[str, int | None]:
        """Every key, with its time to live in ms."""

    @abstractmethod
    async def drop(self, key: str) -> None:
        """Delete a key, as its expiry does."""

    @abstractmethod
    async def trim(self, key: str) -> None:
        """Delete every entry of a stream; its last id stays."""

    @abstractmethod
    async def snapshot(self, *keys: str) -> Callable[[], Awaitable[None]]:
        """Save these keys; the returned function restores them at once, like a server losing writes."""

    async def close(self) -> None:
        for streams in self._opened:
            with contextlib.suppress(Disconnected):
                await streams.close()


class MemoryHarness(Harness):
    def __init__(self) -> None:
        super().__init__()
        self.streams = MemoryStreams()

    def _connect(self) -> Streams:
        return self.streams

    async def keys(self) -> dict[str, int | None]:
        return self.streams.keys()

    async def drop(self, key: str) -> None:
        self.streams.drop(key)

    async def trim(self, key: str) -> None:
        for entry_id, _ in await self.streams.range(key, "-", "+", 10_000):
            await self.streams.delete(key, entry_id)

    async def snapshot(self, *keys: str) -> Callable[[], Awaitable[None]]:
        saved = {key: copy.deepcopy(self.streams._streams.get(key) or self.streams._hashes.get(key)) for key in keys}

        async def restore() -> None:
            for key, value in saved.items():
                self.streams.drop(key)
                table = self.streams._hashes if isinstance(value, dict) else self.streams._streams
                if value is not None:
                    table[key] = copy.deepcopy(value)
                    self.streams._expiry_ms[key] = self.streams._now() + 60_000

        return restore


class RedisHarness(Harness):
    """Base class for servers that redis-py connects to."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = self._raw()

    @abstractmethod
    def _raw(self) -> Redis:
        """A client for direct access to keys."""

    async def keys(self) -> dict[str, int | None]:
        found: dict[str, int | None] = {}
        for key in await self.raw.keys("*"):
            ttl = await self.raw.pttl(key)
            found[key.decode()] = None if ttl == -1 else ttl
        return found

    async def drop(self, key: str) -> None:
        await self.raw.delete(key)

    async def trim(self, key: str) -> None:
        await self.raw.xtrim(key, maxlen=0, approximate=False)

    async def snapshot(self, *keys: str) -> Callable[[], Awaitable[None]]:
        saved = {key: await self.raw.dump(key) for key in keys}

        async def restore() -> None:
            async with self.raw.pipeline(transaction=True) as pipe:
                for key, value in saved.items():
                    if value is None:
                        pipe.delete(key)
                    else:
                        pipe.restore(key, 60_000, value, replace=True)
                await pipe.execute()

        return restore

    async def close(self) -> None:
        await super().close()
        await self.raw.aclose()


class FakeServer:
    """`Server` over a client of fakeredis, whose replies are not converted."""

    clustered = False

    def __init__(self, client: Redis) -> None:
        self._client = client
        client.response_callbacks.clear()

    async def exchange(self, commands: Sequence[Command], *, blocking: bool = False) -> list[Any]:
        return [await self._reply(command) for command in commands]

    async def _reply(self, command: Command) -> Any:
        try:
            return await self._client.execute_command(*command)
        except ResponseError as error:
            return error

    async def exchange_at(self, key: str, commands: Sequence[Command]) -> list[Any]:
        if commands[0] != ("MULTI",):
            return await self.exchange(commands)
        async with self._client.pipeline(transaction=True) as pipe:
            for command in commands[1:-1]:
                pipe.execute_command(*command)
            replies = await pipe.execute(raise_on_error=False)
        return [b"OK", *[b"QUEUED"] * len(replies), replies]

    def fails_over_alone(self, key: str) -> bool:
        return False

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[FakeServer]:
        yield self

    def suspect_idle(self) -> None: ...

    async def close(self) -> None:
        await self._client.aclose()


class FakeRedisHarness(RedisHarness):
    def __init__(self) -> None:
        self.server = fakeredis.FakeServer()
        super().__init__()

    def _raw(self) -> Redis:
        return fakeredis.FakeAsyncRedis(server=self.server, protocol=2)

    def _connect(self) -> Streams:
        return RedisStreams(FakeServer(self._raw()))


class ServerHarness(RedisHarness):
    def __init__(self, url: str) -> None:
        self.url = url
        super().__init__()

    def _raw(self) -> Redis:
        return Redis.from_url(self.url, protocol=2)

    def _connect(self) -> Streams:
        return RedisStreams.from_url(self.url)


class ClusterHarness(RedisHarness):
    def __init__(self, cluster: ClusterServer) -> None:
        self.url = cluster.url
        self._nodes = [Redis(port=node.port, protocol=2) for node in cluster.nodes]
        super().__init__()

    def _raw(self) -> Any:
        return RedisCluster(host="127.0.0.1", port=self._nodes[0].connection_pool.connection_kwargs["port"])

    def _connect(self) -> Streams:
        return RedisStreams.from_url(self.url)

    async def keys(self) -> dict[str, int | None]:
        found: dict[str, int | None] = {}
        for node in self._nodes:
            for key in await node.keys("*"):
                ttl = await self.raw.pttl(key)
                found[key.decode()] = None if ttl == -1 else ttl
        return found

    async def snapshot(self, *keys: str) -> Callable[[], Awaitable[None]]:
        saved = {key: await self.raw.dump(key) for key in keys}

        async def restore() -> None:
            for key, value in saved.items():
                if value is None:
                    await self.raw.delete(key)
                else:
                    await self.raw.restore(key, 60_000, value, replace=True)

        return restore

    async def close(self) -> None:
        await super().close()
        for node in self._nodes:
            await node.aclose()


async def _nothing(_: str) -> None: ...


class LossyStreams:
    """A connection that executes each call and then loses the reply if `lose(name)` is true."""

    def __init__(
        self, streams: Streams, lose: Callable[[str], bool], before: Callable[[str], Awaitable[None]] = _nothing
    ) -> None:
        self._streams = streams
        self._lose = lose
        self._before = before

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._streams, name)
        if name in ("reconnects", "documents", "contact", "max_separate_reads", "close"):
            return attribute

        async def call(*args: Any, **kwargs: Any) -> Any:
            await self._before(name)
            reply = await attribute(*args, **kwargs)
            if self._lose(name):
                raise Disconnected("the reply was lost")
            return reply

        return call
