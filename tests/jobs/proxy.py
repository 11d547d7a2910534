"""A TCP proxy on loopback, which can damage replies, hold connections and carry nothing."""

from __future__ import annotations

import asyncio
import contextlib
import math
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field


@dataclass(eq=False)
class ProxiedConnection:
    """A connection of a client and that of the proxy to the server."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    muted: bool = False
    """Drops all further bytes of both directions, and does not close its ends."""
    open: asyncio.Event = field(default_factory=asyncio.Event)
    """Carries bytes only while this is set. What arrives meanwhile is delivered later."""

    def abort(self) -> None:
        """Close both ends at once, without what is on the way."""
        self.client.transport.abort()
        self.server.transport.abort()


Reply = Callable[[ProxiedConnection, bytes], Awaitable[None]]
"""Delivers bytes of the server to the client of the connection, or does not."""


async def deliver(connection: ProxiedConnection, data: bytes) -> None:
    """Deliver bytes as they are."""
    connection.client.write(data)
    await connection.client.drain()


class Proxy:
    """Forwards connections, over TLS if given, to the port `target`, which may change."""

    def __init__(self, target: int, tls: ssl.SSLContext | None = None, reply: Reply = deliver) -> None:
        self.target = target
        self.bytes_per_s = math.inf
        self.port = 0
        self.reply = reply
        self.connections: set[ProxiedConnection] = set()
        """Those that are open."""
        self._tls = tls
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Listen on `port`."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]

    def mute(self) -> None:
        """Drop all further bytes of the connections that are open now. Their ends are not closed."""
        for connection in self.connections:
            connection.muted = True

    def cut(self) -> None:
        """Close the connections that are open now."""
        for connection in list(self.connections):
            connection.abort()

    async def close(self) -> None:
        """Close the port and all connections."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.cut()
        await asyncio.sleep(0)  # the transports close their sockets

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "a callback of asyncio.start_server is a task"
        self._tasks.add(task)
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except (OSError, asyncio.CancelledError):
            # The server is down, or `close` does not wait for it. Python 3.11 reports a callback of
            # asyncio.start_server that ends as cancelled.
            writer.transport.abort()
            return
        finally:
            self._tasks.discard(task)
        connection = ProxiedConnection(writer, server_writer)
        connection.open.set()
        self.connections.add(connection)
        carrying = asyncio.create_task(self._carry(connection, reader, server_reader))
        self._tasks.add(carrying)
        carrying.add_done_callback(self._tasks.discard)

    async def _carry(
        self, connection: ProxiedConnection, reader: asyncio.StreamReader, server_reader: asyncio.StreamReader
    ) -> None:
        """Forward both directions until both ends are closed."""
        try:
            await asyncio.gather(self._send(connection, reader), self._receive(connection, server_reader))
        finally:
            connection.abort()
            self.connections.discard(connection)

    async def _send(self, connection: ProxiedConnection, reader: asyncio.StreamReader) -> None:
        """Forward what the client sends, to its end."""
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                await connection.open.wait()
                if not connection.muted:
                    connection.server.write(data)
                    await asyncio.sleep(len(data) / self.bytes_per_s)
                    await connection.server.drain()
        await connection.open.wait()
        connection.server.close()

    async def _receive(self, connection: ProxiedConnection, reader: asyncio.StreamReader) -> None:
        """Forward what the server sends, to its end."""
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                await connection.open.wait()
                if not connection.muted:
                    await self.reply(connection, data)
                    await asyncio.sleep(len(data) / self.bytes_per_s)
        await connection.open.wait()
        if not connection.muted:
            connection.client.close()


@contextlib.asynccontextmanager
async def running_proxy(port: int, tls: ssl.SSLContext | None = None, reply: Reply = deliver) -> AsyncIterator[Proxy]:
    """A proxy of the server on `port`, open in the block."""
    proxy = Proxy(port, tls, reply)
    await proxy.open()
    try:
        yield proxy
    finally:
        await proxy.close()
