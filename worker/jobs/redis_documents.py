"""`Documents` on Redis 7.0 or later, and Valkey."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from redis import exceptions
from redis.asyncio import Redis

from worker.jobs.redis_errors import translate
from worker.jobs.streams import repeat_briefly


class RedisDocuments:
    """`Documents` over the client of `RedisStreams`. Interrupted calls are repeated briefly."""

    def __init__(self, client: Redis, address: str) -> None:
        self._client = client
        self._address = address

    async def put(self, key: str, fields: Mapping[str, str | bytes], ttl_ms: int) -> None:
        async def put() -> None:
            async with self._client.pipeline(transaction=True) as pipe:
                pipe.hset(key, mapping=dict(fields.items()))
                pipe.pexpire(key, ttl_ms)
                await pipe.execute()

        await self._call(put)

    async def get(self, key: str) -> dict[str, bytes]:
        fields = await self._call(lambda: self._client.hgetall(key))
        return {_text(name): value for name, value in fields.items()}

    async def values(self, key: str, names: Sequence[str]) -> list[bytes | None]:
        return list(await self._call(lambda: self._client.hmget(key, list(names))))

    async def names(self, key: str) -> list[str]:
        return [_text(name) for name in await self._call(lambda: self._client.hkeys(key))]

    async def put_once(self, key: str, name: str, value: str | bytes) -> bool:
        return bool(await self._call(lambda: self._client.hsetnx(key, name, value)))

    async def increment(self, key: str, name: str) -> None:
        await self._call(lambda: self._client.hincrby(key, name, 1))

    async def expire(self, key: str, ttl_ms: int) -> None:
        await self._call(lambda: self._client.pexpire(key, ttl_ms))

    async def shorten(self, key: str, ttl_ms: int) -> None:
        await self._call(lambda: self._client.pexpire(key, ttl_ms, lt=True))

    async def delete(self, key: str) -> bool:
        return bool(await self._call(lambda: self._client.delete(key)))

    async def enlist(self, index: str, member: str, time_ms: int, keep_ms: int) -> None:
        async def enlist() -> None:
            async with self._client.pipeline(transaction=True) as pipe:
                pipe.zadd(index, {member: time_ms})
                pipe.zremrangebyscore(index, "-inf", f"({time_ms - keep_ms}")
                pipe.pexpire(index, keep_ms)
                await pipe.execute()

        await self._call(enlist)

    async def listed(self, index: str) -> list[str]:
        members = await self._call(lambda: self._client.zrange(index, 0, -1))
        return [_text(member) for member in reversed(members)]

    async def unlist(self, index: str, member: str) -> None:
        await self._call(lambda: self._client.zrem(index, member))

    async def hold(self, key: str, owner: str, ttl_ms: int) -> bool:
        """SET NX. A lease that ends between GET and SET may be taken twice: work is repeatable."""
        if await self._call(lambda: self._client.set(key, owner, nx=True, px=ttl_ms)):
            return True
        if await self._call(lambda: self._client.get(key)) != owner.encode():
            return False
        await self._call(lambda: self._client.set(key, owner, px=ttl_ms))
        return True

    async def release(self, key: str, owner: str) -> None:
        if await self._call(lambda: self._client.get(key)) == owner.encode():
            await self._call(lambda: self._client.delete(key))

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


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
