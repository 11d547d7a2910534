"""The network of a run: a proxy between each process and the server, whose links can be faulty."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from random import Random

from tests.jobs.proxy import ProxiedConnection, Proxy, deliver

NETWORK_FAULTS: Mapping[str, float] = {
    "cut": 4,  # the connections are closed, some in the middle of a reply
    "lost replies": 4,  # commands are executed, and their replies dropped, with their connection or without
    "late replies": 3,  # some later than a lease
    "repeated replies": 3,  # each reply comes twice, at once or just before the next one
    "stalled": 4,  # open connections carry nothing: for a while, or until the other side gives them up
}
"""Faults of links and their relative frequency."""
_LATE_S = 3.5
"""The longest delay of a reply. Some callers give up earlier, and repeat their call."""
_DROP_S = 0.7
"""The duration of lost replies."""


class Link:
    """A proxy between one process and the server."""

    def __init__(self, target: int, seed: str) -> None:
        self._random = Random(seed)
        self._proxy = Proxy(target, reply=self._reply)
        self._fault = ""
        self._until = 0.0
        self._last: dict[ProxiedConnection, bytes] = {}

    @property
    def url(self) -> str:
        """The server, through this link."""
        return f"redis://127.0.0.1:{self._proxy.port}"

    async def open(self) -> None:
        """Listen on a port."""
        await self._proxy.open()

    async def close(self) -> None:
        """Close all connections."""
        await self._proxy.close()

    def redirect(self, target: int) -> None:
        """Connect to another server from now on, and close the connections to the former one."""
        self._proxy.target = target
        self._proxy.cut()

    def inject(self, kind: str, seconds: float) -> None:
        """Begin a fault, which ends by itself."""
        self._fault, self._until = (
            kind,
            time.monotonic() + (min(seconds, _DROP_S) if kind == "lost replies" else seconds),
        )
        if kind == "cut" and self._random.random() < 0.5:
            self._proxy.cut()
        elif kind == "stalled":
            self._stall(seconds)

    def _stall(self, seconds: float) -> None:
        """Hold the open connections; one half is dropped in the end, one half delivers what it held."""
        held, loop = list(self._proxy.connections), asyncio.get_running_loop()
        for connection in held:
            if self._random.random() < 0.5:
                connection.muted = True
            else:
                connection.open.clear()
                loop.call_later(seconds, connection.open.set)

    async def _reply(self, connection: ProxiedConnection, data: bytes) -> None:
        """Deliver a reply, or do with it what the fault does."""
        fault = self._fault if time.monotonic() < self._until else ""
        if fault == "cut":
            await deliver(connection, data[: self._random.randrange(len(data))])
            connection.abort()
        elif fault == "lost replies":
            if self._random.random() < 0.5:
                connection.abort()
            connection.muted = True  # as TCP does, never delivers what follows a lost part
        elif fault == "late replies":
            await asyncio.sleep(self._random.choice([0.02, 0.2, self._random.uniform(0, _LATE_S)]))
            await deliver(connection, data)
        elif fault == "repeated replies":
            late = self._last.pop(connection, b"")
            if self._random.random() < 0.5:
                self._last[connection] = data
            await deliver(connection, late + data + (b"" if connection in self._last else data))
        else:
            await deliver(connection, data)


class Network:
    """The links of a run, by the name of their process."""

    def __init__(self, target: int, names: Iterable[str], seed: int) -> None:
        self.links = {name: Link(target, f"link {name} {seed}") for name in names}
        self.counts: dict[str, int] = dict.fromkeys(NETWORK_FAULTS, 0)
        """Faults of links so far, by kind. One that affects all links counts once."""
        self._random = Random(f"network {seed}")

    async def open(self) -> None:
        """Open the links."""
        for link in self.links.values():
            await link.open()

    async def close(self) -> None:
        """Close the links."""
        for link in self.links.values():
            await link.close()

    def redirect(self, target: int) -> None:
        """Connect to another server from now on."""
        for link in self.links.values():
            link.redirect(target)

    def inject(self, kind: str, everywhere: bool, seconds: float) -> None:
        """Begin a fault of one link, or of all."""
        self.counts[kind] += 1
        names = list(self.links)
        for name in names if everywhere else [self._random.choice(names)]:
            self.links[name].inject(kind, seconds)
