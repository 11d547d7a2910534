"""Connections to one Redis server, for callers that wait for a connection instead of failing.

redis-py opens connections: TCP, TLS, login, database. Commands and replies are exchanged here, with
no retry, since the caller must know when a reply was lost. A connection through NAT or a load
balancer may die without being closed. Three things find it: the time-out of a reply, TCP keep-alive
on idle connections, and, after a reply was lost, `suspect_idle`. A connection that the server
closed is replaced before it is used. `redis_server.py` uses the pools.

RESP has no request ids: if a proxy repeats or drops a reply, each later command would receive the
reply to another one. So each write begins and ends with a numbered PING. Replies before that of the
first one are stale and dropped; that of the last one must follow those of the commands.
"""

import asyncio
import contextlib
import math
import select
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import count as counter
from typing import Any

from redis import exceptions
from redis.asyncio import Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider

from worker.jobs.redis_errors import code_of
from worker.jobs.redis_resp import Command, Replies, pack_command
from worker.redis_url import Address, Login, RedisUrl

_TCP_OPTIONS = {"TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 2, "TCP_USER_TIMEOUT": 4000}
"""A peer that acknowledges nothing is detected within 4 s. All in s, but TCP_USER_TIMEOUT in ms."""
_MIN_BYTES_PER_S = 500_000
_READ_BYTES = 65_536
_NUMBERS = counter()
_OUT_OF_STEP = "a reply was repeated, damaged or lost on the way"


@dataclass(slots=True)
class _Write:
    """Commands that are sent in one write between two PINGs, and their replies."""

    first: bytes = field(default_factory=lambda: b"%d" % next(_NUMBERS))
    last: bytes = field(default_factory=lambda: b"%d" % next(_NUMBERS))

    def pack(self, commands: Sequence[Command]) -> bytes:
        """Encode the commands between the PINGs."""
        return b"".join(map(pack_command, (("PING", self.first), *commands, ("PING", self.last))))

    def is_stale(self, replies: Sequence[Any]) -> bool:
        """Whether the first reply is not the first PING's, which may be refused, or is repeated."""
        if not replies:
            return False
        refused = isinstance(replies[0], exceptions.ResponseError)
        return bool(replies[0] != self.first and not refused) or self.first in replies[1:]

    def has_begun(self, replies: Sequence[Any]) -> bool:
        """Whether the first PING's reply is there: the server is one of Redis's kind."""
        return self.first in replies[:1]

    def replies_of(self, replies: Sequence[Any]) -> list[Any]:
        """The commands' replies. Raises ConnectionError if they may be those of other commands.

        A server that cannot save refuses PING and serves reads; one that loads its data does so and
        serves TIME. One that runs a script refuses every command.
        """
        pong, own = replies[-1], list(replies[1:-1])
        if isinstance(pong, exceptions.ResponseError):
            refused = all(isinstance(reply, exceptions.ResponseError) for reply in own)
            in_step = refused or code_of(pong) in ("LOADING", "MISCONF", "NOPERM")
        else:
            in_step = pong == self.last
        if not in_step:
            raise exceptions.ConnectionError(_OUT_OF_STEP)
        return own


OnConnect = Callable[[AbstractConnection], Awaitable[None]]
Locate = Callable[[], Awaitable[Address]]
"""Returns the address of the server that a new connection is to be opened to."""


class _Exchanging(AbstractConnection):
    """A connection that sends packed commands and parses their replies."""

    replied = False
    """Whether any reply has arrived."""
    surplus = b""
    """What followed the last reply of `exchange`."""

    async def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one write; return their replies, errors included.

        The connection is open. Silence is bounded by `socket_timeout`, plus the time that the
        commands take on a slow link, since the kernel does not report how much of them is sent.
        Raises redis-py's exceptions, and closes the connection then.
        """
        reader, writer = self._reader, self._writer
        assert reader is not None, "connected"
        assert writer is not None, "connected"
        write = _Write()
        packed = write.pack(commands)
        replies, limit_s = Replies(len(commands) + 2), (self.socket_timeout or 0.0) + len(packed) / _MIN_BYTES_PER_S
        try:
            async with asyncio.timeout(limit_s) as silence:
                writer.write(packed)
                await writer.drain()
                data = self.surplus
                while True:
                    replies.feed(data)
                    while write.is_stale(replies.values):
                        replies.drop_first()
                    if replies.complete:
                        break
                    data = await reader.read(_READ_BYTES)
                    if not data and not _end_with_refusal(replies, len(commands) + 1):
                        raise exceptions.ConnectionError("connection closed by server")
                    silence.reschedule(asyncio.get_running_loop().time() + limit_s)
            self.surplus = replies.surplus
            own = write.replies_of(replies.values)
        except BaseException as error:
            await self.disconnect(nowait=True)
            if isinstance(error, exceptions.InvalidResponse) and write.has_begun(replies.values):
                raise exceptions.ConnectionError(_OUT_OF_STEP) from error
            if isinstance(error, TimeoutError):
                raise exceptions.TimeoutError("timeout reading from socket") from error
            if isinstance(error, OSError):
                raise exceptions.ConnectionError(f"error while reading from socket: {error.args}") from error
            raise
        self.replied = True
        return own


def _end_with_refusal(replies: Replies, received: int) -> bool:
    """Complete replies that end with an error after which the server closed the connection."""
    values: Sequence[Any] = replies.values
    if len(values) != received or not isinstance(values[-1], exceptions.ResponseError):
        return False
    replies.values.append(values[-1])
    return True


class _Tcp(_Exchanging, Connection):
    pass


class _Tls(_Exchanging, SSLConnection):
    pass


class _Unix(_Exchanging, UnixDomainSocketConnection):
    pass


_CLASSES: dict[str, type[_Exchanging]] = {"redis": _Tcp, "rediss": _Tls, "unix": _Unix}


class _Credentials(CredentialProvider):
    """Reads the password file for each connection, so that a changed password is used."""

    def __init__(self, login: Login) -> None:
        self._login = login

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        try:
            username, password = self._login.read()
        except ValueError as error:
            raise exceptions.ConnectionError(str(error)) from None
        return (username, password or "") if username else (password or "",)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        return self.get_credentials()


def new_connection(
    url: RedisUrl, login: Login, address: Address | None, timeout_s: float, on_connect: OnConnect | None = None
) -> _Exchanging:
    """A connection that is not open, to `address` or, for None, the URL's socket. No retries."""
    options: dict[str, Any] = {"path": url.path} if address is None else {"host": address.host, "port": address.port}
    if address is not None:
        numbers = {getattr(socket, name): value for name, value in _TCP_OPTIONS.items() if hasattr(socket, name)}
        options |= {"socket_keepalive": True, "socket_keepalive_options": numbers}
    if login != Login():
        options["credential_provider"] = _Credentials(login)
    options |= {"protocol": 2, "socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    options |= {"db": url.db, "client_name": url.client_name, "redis_connect_func": on_connect}
    options |= {"retry": Retry(NoBackoff(), 0), **url.tls}
    if options.get("ssl_cert_reqs") == "none":  # redis-py 6 refuses it with a check of the host's name
        options.setdefault("ssl_check_hostname", False)
    if "ssl_min_version" in options:
        options["ssl_min_version"] = ssl.TLSVersion[options["ssl_min_version"]]
    connection = _CLASSES[url.transport](**options)
    for name in ("driver_info", "lib_name", "lib_version"):  # CLIENT SETINFO is a right that Redis 7.0 cannot grant
        setattr(connection, name, None)
    return connection


class WaitingPool:
    """A pool of up to `size` connections. Callers wait while all are in use."""

    def __init__(self, size: int, create: Callable[[], _Exchanging], locate: Locate | None = None) -> None:
        self._create = create
        self._locate = locate
        self._free = asyncio.Semaphore(size)
        self._idle: list[_Exchanging] = []
        self._opened: set[_Exchanging] = set()
        self._suspect_s = 0.0
        self._closed = False
        self._released_s: dict[_Exchanging, float] = {}

    @property
    def connections(self) -> Sequence[_Exchanging]:
        """All connections, in use or idle."""
        return list(self._opened)

    def suspect_idle(self) -> None:
        """Replace each connection that is idle now before it is used again."""
        self._suspect_s = time.monotonic()

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[_Exchanging]:
        """An open connection, as far as this side can see; it is not opened again in the block."""
        async with self._free:
            connection = self._idle.pop() if self._idle else self._create()
            self._opened.add(connection)
            try:
                await self._ensure_open(connection)
                yield connection
            except exceptions.ConnectionError as error:
                error.is_first = not connection.replied  # type: ignore[attr-defined]  # for `translate`
                raise
            finally:
                self._released_s[connection] = time.monotonic()
                self._idle.append(connection)
                if self._closed:
                    await connection.disconnect(nowait=True)

    async def _ensure_open(self, connection: _Exchanging) -> None:
        if self._released_s.get(connection, math.inf) < self._suspect_s or _is_readable(connection):
            await connection.disconnect(nowait=True)
        if not connection.is_connected:
            address = await self._locate() if self._locate else None
            if address is not None and isinstance(connection, Connection):
                connection.host, connection.port = address
            connection.surplus = b""
            try:
                await connection.connect()  # type: ignore[no-untyped-call]
            except BaseException as error:
                await connection.disconnect(nowait=True)  # redis-py does not if it is cancelled during the login
                if address is not None:
                    error.where = f"master {address}"  # type: ignore[attr-defined]  # `translate` names it
                raise

    async def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one write; return their replies, errors included."""
        async with self.connection() as connection:
            return await connection.exchange(commands)

    async def close(self) -> None:
        """Close all connections. Exchanges that wait for a reply raise ConnectionError."""
        self._closed = True
        await asyncio.gather(*(each.disconnect() for each in self.connections), return_exceptions=True)


def _is_readable(connection: _Exchanging) -> bool:
    """Whether an idle connection has received something, which can only be its end.

    The event loop may not have run since: `SyncClient` runs it during calls only.
    """
    reader, writer = connection._reader, connection._writer
    if reader is None or writer is None:
        return False
    if reader.at_eof() or writer.is_closing():
        return True
    if (link := writer.get_extra_info("socket")) is None or link.fileno() < 0:
        return False
    poll = select.poll()
    poll.register(link.fileno(), select.POLLIN)
    return bool(poll.poll(0))
