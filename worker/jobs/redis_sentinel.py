"""The address of a master that Redis Sentinel monitors, requested for each new connection.

Connections to sentinels are short, since Sentinel is queried when a connection was lost, and then
one to a sentinel may be lost as well.
"""

import asyncio
import time
from dataclasses import replace
from typing import Any

from redis import exceptions

from worker.jobs.redis_pool import new_connection
from worker.redis_url import Address, RedisUrl

_TIMEOUT_S = 1.0
_VALID_S = 0.1
"""Connections that open together use one reply."""


class Sentinels:
    """The sentinels of a `redis+sentinel://` URL."""

    def __init__(self, url: RedisUrl) -> None:
        self._url = replace(url, db=0)  # a sentinel has no databases
        self._lock = asyncio.Lock()
        self._master = Address("", 0)
        self._read_s = -_VALID_S

    async def master(self) -> Address:
        """The newest master's address that a majority of sentinels, or all reachable ones, have.

        Raises redis-py's exceptions: ResponseError if the sentinels do not know the service.
        """
        async with self._lock:
            if time.monotonic() - self._read_s >= _VALID_S:
                self._master, self._read_s = await self._request(), time.monotonic()
            return self._master

    async def _request(self) -> Address:
        """A sentinel that was cut off has an old address; the configuration epoch shows which."""
        queries = [asyncio.create_task(self._query(address)) for address in self._url.addresses]
        found: list[tuple[int, Address]] = []
        errors: list[exceptions.RedisError] = []
        try:
            for query in asyncio.as_completed(queries):
                try:
                    found.append(await query)
                except exceptions.RedisError as error:
                    errors.append(error)
                if len(found) > len(queries) // 2:
                    break
        finally:
            for task in queries:
                task.cancel()
            await asyncio.gather(*queries, return_exceptions=True)
        if found:
            return max(found)[1]
        cause = next((each for each in errors if isinstance(each, exceptions.ResponseError)), errors[0])
        cause.where = "no sentinel replied"  # type: ignore[attr-defined]  # `translate` shows it
        raise cause

    async def _query(self, address: Address) -> tuple[int, Address]:
        """The epoch and the address of the master that one sentinel reports."""
        connection = new_connection(self._url, self._url.sentinel_login, address, _TIMEOUT_S)
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
            (reply,) = await connection.exchange([("SENTINEL", "MASTER", self._url.service)])
        finally:
            await connection.disconnect(nowait=True)
        if isinstance(reply, exceptions.RedisError):
            raise reply
        return _epoch_and_address(reply)


def _epoch_and_address(flat: list[bytes]) -> tuple[int, Address]:
    fields: dict[str, Any] = {name.decode(): value.decode() for name, value in zip(flat[::2], flat[1::2], strict=True)}
    return int(fields["config-epoch"]), Address(fields["ip"], int(fields["port"]))
