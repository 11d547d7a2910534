"""redis-py clients for a checked URL, whose callers wait for a connection instead of failing.

A connection through NAT or a load balancer may die without being closed. Three things find it: the
socket time-out of a reply, TCP keep-alive on idle connections, and, after a reply was lost,
`suspect_idle`. A connection that the server closed is replaced before it is used.
"""

import asyncio
import contextlib
import math
import select
import socket
import ssl
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any, SupportsIndex

from redis import exceptions
from redis.asyncio import Connection, Redis, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from worker.jobs.redis_resp import Replies
from worker.redis_url import RedisUrl

_TCP_OPTIONS = {"TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 2, "TCP_USER_TIMEOUT": 4000}
"""A peer that acknowledges nothing is detected within 4 s. All in s, but TCP_USER_TIMEOUT in ms."""
_MIN_BYTES_PER_S = 500_000
_READ_BYTES = 65_536


class _Steady(AbstractConnection):
    """Bounds silence by `socket_timeout`, where redis-py bounds a whole command or reply.

    Megabytes may take longer than that on a slow link. A command gets more time by its size, since
    the kernel does not report how much of it is sent; a reply gets more with each part received.
    """

    def __init__(self, *, socket_timeout: float, **options: Any) -> None:
        super().__init__(socket_timeout=socket_timeout, **options)
        self._silence_s = socket_timeout

    async def _connect(self) -> None:
        await super()._connect()  # type: ignore[no-untyped-call, safe-super]
        reader = self._reader
        assert reader is not None, "connected"
        feed_data = reader.feed_data

        def feed_and_extend(data: Iterable[SupportsIndex]) -> None:
            feed_data(data)
            self.update_current_socket_timeout(-1)  # restart the time-out of the read in progress

        reader.feed_data = feed_and_extend  # type: ignore[method-assign]

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        """Send a command, and give it and its reply a time-out by its size."""
        size = len(command) if isinstance(command, str | bytes) else sum(map(len, command))
        self.socket_timeout = self._silence_s + size / _MIN_BYTES_PER_S
        await super().send_packed_command(command, check_health)

    async def exchange(self, commands: bytes, count: int) -> list[Any]:
        """Send `count` packed commands in one write; return their replies, errors included.

        The connection is open. Raises redis-py's exceptions, and closes the connection then.
        """
        reader, writer = self._reader, self._writer
        assert reader is not None, "connected"
        assert writer is not None, "connected"
        replies, limit_s = Replies(count), self._silence_s + len(commands) / _MIN_BYTES_PER_S
        try:
            async with asyncio.timeout(limit_s) as silence:
                writer.write(commands)
                await writer.drain()
                while not replies.complete:
                    data = await reader.read(_READ_BYTES)
                    if not data:
                        raise exceptions.ConnectionError("connection closed by server")
                    replies.feed(data)
                    silence.reschedule(asyncio.get_running_loop().time() + limit_s)
        except BaseException as error:
            await self.disconnect(nowait=True)
            if isinstance(error, TimeoutError):
                raise exceptions.TimeoutError("timeout reading from socket") from error
            if isinstance(error, OSError):
                raise exceptions.ConnectionError(f"error while reading from socket: {error.args}") from error
            raise
        return replies.values


class _Tcp(_Steady, Connection):
    pass


class _Tls(_Steady, SSLConnection):
    pass


class _Unix(_Steady, UnixDomainSocketConnection):
    pass


_CLASSES = {"redis": _Tcp, "rediss": _Tls, "unix": _Unix}


class WaitingPool(ConnectionPool):
    """A pool of up to `size` connections. `get_connection` waits while all are in use.

    redis-py's BlockingConnectionPool loses a wake-up if the waiter is cancelled at that moment.
    """

    def __init__(self, size: int, **options: Any) -> None:
        super().__init__(**options)
        self.max_connections = size
        self._free = asyncio.Semaphore(size)
        self._suspect_s = 0.0
        self._released_s: dict[AbstractConnection, float] = {}

    def suspect_idle(self) -> None:
        """Replace each connection that is idle now before it is used again."""
        self._suspect_s = time.monotonic()

    async def get_connection(self, command_name: Any = None, *_: Any, **__: Any) -> AbstractConnection:
        """Return a connection that is open, as far as this side can see."""
        await self._free.acquire()
        connection: AbstractConnection = self.get_available_connection()  # type: ignore[no-untyped-call]
        try:
            if self._released_s.get(connection, math.inf) < self._suspect_s or _is_readable(connection):
                await connection.disconnect(nowait=True)
            await self.ensure_connection(connection)
        except BaseException:
            await self.release(connection)
            raise
        return connection

    async def release(self, connection: AbstractConnection) -> None:
        """Return the connection to the pool."""
        try:
            self._released_s[connection] = time.monotonic()
            await super().release(connection)
        finally:
            self._free.release()

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[_Steady]:
        """An open connection, which is not opened again in the block."""
        connection = await self.get_connection()
        assert isinstance(connection, _Steady), "`open_client` has chosen the class"
        try:
            yield connection
        finally:
            await self.release(connection)

    async def exchange(self, commands: bytes, count: int) -> list[Any]:
        """Send `count` packed commands in one write; return their replies, errors included."""
        async with self.connection() as connection:
            return await connection.exchange(commands, count)


def _is_readable(connection: AbstractConnection) -> bool:
    """Whether an idle connection has received something, which can only be its end.

    The event loop may not have run since: `SyncClient` runs it during calls only.
    """
    writer = connection._writer
    if writer is None or (link := writer.get_extra_info("socket")) is None or link.fileno() < 0:
        return False
    poll = select.poll()
    poll.register(link.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def open_client(url: RedisUrl, size: int, timeout_s: float) -> Redis:
    """Create a client that connects on first use, does not retry, and bounds each reply's time."""
    options: dict[str, Any] = {"path": url.path} if url.scheme == "unix" else {"host": url.host, "port": url.port}
    if url.scheme != "unix":
        numbers = {getattr(socket, name): value for name, value in _TCP_OPTIONS.items() if hasattr(socket, name)}
        options |= {"socket_keepalive": True, "socket_keepalive_options": numbers}
    options |= {"db": url.db, "username": url.username, "password": url.password, "client_name": url.client_name}
    options |= {"driver_info": None}  # CLIENT SETINFO is a right that Redis 7.0 cannot grant
    options |= {"protocol": 2, "socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    options |= {"retry": Retry(NoBackoff(), 0), **url.tls}
    if "ssl_min_version" in options:
        options["ssl_min_version"] = ssl.TLSVersion[options["ssl_min_version"]]
    return Redis.from_pool(WaitingPool(size, connection_class=_CLASSES[url.scheme], **options))
