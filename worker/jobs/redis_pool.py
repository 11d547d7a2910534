"""redis-py clients for a checked URL, whose callers wait for a connection instead of failing.

A connection through NAT or a load balancer may die without being closed. Three things find it: the
socket time-out of a reply, TCP keep-alive on idle connections, and, after a reply was lost,
`suspect_idle`. A connection that the server closed is replaced before it is used.
"""

import asyncio
import math
import select
import socket
import time
from typing import Any

from redis.asyncio import Connection, Redis, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from worker.redis_url import RedisUrl

_CLASSES = {"redis": Connection, "rediss": SSLConnection, "unix": UnixDomainSocketConnection}
_TCP_OPTIONS = {"TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 2, "TCP_USER_TIMEOUT": 4000}
"""A peer that acknowledges nothing is detected within 4 s. All in s, but TCP_USER_TIMEOUT in ms."""


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
    return Redis.from_pool(WaitingPool(size, connection_class=_CLASSES[url.scheme], **options))
