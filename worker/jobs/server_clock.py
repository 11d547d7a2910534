"""The server's clock, by which deadlines count, without a question to the server for each job.

It is asked for when a worker has nothing else to do, and told by our own monotonic clock in between. Knows no job.
"""

from __future__ import annotations

import contextlib
import math
import time

from worker.jobs.streams import Disconnected, Streams, retry_until_connected

_VALID_S = 10.0
"""For so long the lead over our clock is used: two clocks drift apart by less than a millisecond meanwhile."""


class ServerClock:
    """The clock of the server that `streams` is connected to; another connection may be another server."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._connection = streams.reconnects
        self._read_s = -math.inf
        self._lead_ms = 0.0

    async def ms(self) -> int:
        """Milliseconds since 1970."""
        if self._age_s > _VALID_S:
            self._set(await retry_until_connected(self._streams.time_ms))
        return int(time.monotonic() * 1000 + self._lead_ms)

    async def keep(self) -> None:
        """Ask for it now if `ms` would have to soon; harmless where the server is away."""
        if self._age_s > _VALID_S / 2:
            with contextlib.suppress(Disconnected):
                self._set(await self._streams.time_ms())

    @property
    def _age_s(self) -> float:
        return time.monotonic() - self._read_s if self._connection == self._streams.reconnects else math.inf

    def _set(self, server_ms: int) -> None:
        self._connection, self._read_s = self._streams.reconnects, time.monotonic()
        self._lead_ms = server_ms - self._read_s * 1000
