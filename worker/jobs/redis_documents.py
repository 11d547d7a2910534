"""`Documents` on Redis 7.0 or later, and Valkey."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from redis import exceptions

from worker.jobs.redis_errors import translate
from worker.jobs.redis_replies import flat, pairs, text_of
from worker.jobs.redis_resp import Command, Value
from worker.jobs.redis_server import Server, run, run_transaction
from worker.jobs.streams import repeat_briefly


class RedisDocuments:
    """`Documents` over the server of `RedisStreams`. Interrupted calls are repeated briefly."""

    def __init__(self, server: Server, address: str) -> None:
        self._server = server
        self._address = address

    async def put(self, key: str, fields: Mapping[str, str | bytes], ttl_ms: int) -> None:
        await self._transaction(("HSET", key, *flat(fields.items())), ("PEXPIRE", key, ttl_ms))

    async def get(self, key: str) -> dict[str, bytes]:
        return {text_of(name): value for name, value in pairs(await self._run("HGETALL", key))}

    async def values(self, key: str, names: Sequence[str]) -> list[bytes | None]:
        return list(await self._run("HMGET", key, *names))

    async def names(self, key: str) -> list[str]:
        return [text_of(name) for name in await self._run("HKEYS", key)]

    async def put_once(self, key: str, name: str, value: str | bytes) -> bool:
        return bool(await self._run("HSETNX", key, name, value))

    async def increment(self, key: str, name: str) -> None:
        await self._run("HINCRBY", key, name, 1)

    async def expire(self, key: str, ttl_ms: int) -> None:
        await self._run("PEXPIRE", key, ttl_ms)

    async def shorten(self, key: str, ttl_ms: int) -> None:
        await self._run("PEXPIRE", key, ttl_ms, "LT")

    async def delete(self, key: str) -> bool:
        return bool(await self._run("DEL", key))

    async def enlist(self, index: str, member: str, time_ms: int, keep_ms: int) -> None:
        await self._transaction(
            ("ZADD", index, time_ms, member),
            ("ZREMRANGEBYSCORE", index, "-inf", f"({time_ms - keep_ms}"),
            ("PEXPIRE", index, keep_ms),
        )

    async def listed(self, index: str) -> list[str]:
        return [text_of(member) for member in reversed(await self._run("ZRANGE", index, 0, -1))]

    async def unlist(self, index: str, member: str) -> None:
        await self._run("ZREM", index, member)

    async def hold(self, key: str, owner: str, ttl_ms: int) -> bool:
        """SET NX. A lease that ends between GET and SET may be taken twice: work is repeatable."""
        if await self._run("SET", key, owner, "PX", ttl_ms, "NX"):
            return True
        if await self._run("GET", key) != owner.encode():
            return False
        await self._run("SET", key, owner, "PX", ttl_ms)
        return True

    async def release(self, key: str, owner: str) -> None:
        if await self._run("GET", key) == owner.encode():
            await self._run("DEL", key)

    async def _run(self, *command: Value) -> Any:
        return await self._call(lambda: run(self._server, *command))

    async def _transaction(self, *commands: Command) -> None:
        await self._call(lambda: run_transaction(self._server, *commands))

    async def _call(self, command: Callable[[], Awaitable[Any]]) -> Any:
        """Await a command's reply, and raise a cancellation that arrives with it."""

        async def call() -> Any:
            task = asyncio.current_task()
            cancellations = task.cancelling() if task else 0
            try:
                return await command()
            except exceptions.RedisError as error:
                raise translate(error, self._address) from error
            finally:
                if task and task.cancelling() > cancellations:
                    raise asyncio.CancelledError

        return await repeat_briefly(call)
