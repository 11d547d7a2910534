"""The `Server` interface: packed commands to one server, or to the nodes of a cluster.

| URL | implementation |
| --- | --- |
| redis://, rediss://, unix:// | `SingleServer` |
| redis+sentinel:// | `SingleServer`, to the master that `redis_sentinel.py` finds |
| redis+cluster:// | `Cluster` in `redis_cluster.py`, with a `SingleServer` for each master |
"""

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from redis import exceptions

from worker.jobs.redis_commands import key_of
from worker.jobs.redis_pool import Locate, OnConnect, WaitingPool, new_connection
from worker.jobs.redis_resp import Command, Value
from worker.redis_url import Address, RedisUrl

COMMAND_TIMEOUT_S = 2.5
"""Less than a lease without the time between renewals: a renewal may time out once."""
MAX_BLOCK_MS = 1500
BLOCKING_TIMEOUT_S = 3.5
"""Exceeds MAX_BLOCK_MS by as much as a reply may take."""
COMMAND_CONNECTIONS = 32
BLOCKING_CONNECTIONS = 256


class Exchange(Protocol):
    """What sends commands. Replies are RESP2 values, errors included as redis-py's exceptions.

    Raises redis-py's ConnectionError and TimeoutError if there is no reply to any command.
    """

    async def exchange(self, commands: Sequence[Command], *, blocking: bool = False) -> list[Any]:
        """Send independent commands, each with keys of one slot. `blocking`: they may block."""

    async def exchange_at(self, key: str, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one write to the node that has `key`."""


class Server(Exchange, Protocol):
    """Connections to one server, or to the nodes of a cluster."""

    clustered: bool
    """Whether a command may only have keys of one slot."""

    def fails_over_alone(self, key: str) -> bool:
        """Whether a replica may replace the node of `key`, and no node of another slot with it.

        The replica may lack its last writes, but other nodes keep what was written after those.
        """

    def session(self) -> contextlib.AbstractAsyncContextManager[Exchange]:
        """Exchanges on one connection, if one server has all keys."""

    def suspect_idle(self) -> None:
        """Replace each connection that is idle now before it is used again."""

    async def close(self) -> None:
        """Close all connections."""


def checked(reply: Any, command: Command) -> Any:
    """Return a reply to the command, or raise it if it is an error."""
    if isinstance(reply, exceptions.RedisError):
        reply.command = command  # type: ignore[attr-defined]  # `translate` names it if a right is missing
        raise reply
    return reply


async def run(server: Exchange, *command: Value, blocking: bool = False) -> Any:
    """The reply to one command. Raises redis-py's exceptions."""
    (reply,) = await server.exchange([command], blocking=blocking)
    return checked(reply, command)


async def run_transaction(server: Exchange, *commands: Command) -> None:
    """Execute commands with keys of one slot by MULTI and EXEC. Raises redis-py's exceptions."""
    replies = await server.exchange_at(key_of(commands[0]), [("MULTI",), *commands, ("EXEC",)])
    for reply, command in zip(replies, (("MULTI",), *commands, ("EXEC",)), strict=True):
        checked(reply, command)
    for reply, command in zip(replies[-1], commands, strict=True):
        checked(reply, command)


class _Session:
    def __init__(self, exchange: Any) -> None:
        self._exchange = exchange

    async def exchange(self, commands: Sequence[Command], *, blocking: bool = False) -> list[Any]:
        assert not blocking, "the connections of sessions have the time-out of commands"
        return list(await self._exchange(commands))

    async def exchange_at(self, key: str, commands: Sequence[Command]) -> list[Any]:
        return await self.exchange(commands)


class SingleServer:
    """One server: a pool for commands, and one for blocking reads, with a longer time-out."""

    clustered = False

    def __init__(
        self, url: RedisUrl, address: Address | None, on_connect: OnConnect | None, locate: Locate | None = None
    ) -> None:
        def pool(size: int, timeout_s: float) -> WaitingPool:
            return WaitingPool(size, lambda: new_connection(url, url.login, address, timeout_s, on_connect), locate)

        self.commands = pool(COMMAND_CONNECTIONS, COMMAND_TIMEOUT_S)
        self.blocking = pool(BLOCKING_CONNECTIONS, BLOCKING_TIMEOUT_S)

    async def exchange(self, commands: Sequence[Command], *, blocking: bool = False) -> list[Any]:
        return await (self.blocking if blocking else self.commands).exchange(commands)

    async def exchange_at(self, key: str, commands: Sequence[Command]) -> list[Any]:
        return await self.commands.exchange(commands)

    def fails_over_alone(self, key: str) -> bool:
        return False

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[Exchange]:
        async with self.commands.connection() as connection:
            yield _Session(connection.exchange)

    def suspect_idle(self) -> None:
        self.commands.suspect_idle()
        self.blocking.suspect_idle()

    async def close(self) -> None:
        await self.commands.close()
        await self.blocking.close()
