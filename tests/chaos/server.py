"""The server of a run, with an append-only file: can be killed, lose and refuse writes, be replaced by a replica."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from tests.chaos.clock import Clock
from worker.embedded import Child, free_port, server_binary

_START_S = 60.0
_FAIL_OVER_S = 60.0
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
    """Unix time before which nothing was lost; infinite if nothing was lost at all."""


class _Mark(NamedTuple):
    """The append-only file at one time."""

    path: Path
    size: int
    time: float
    """Unix time. What the file has after `size` was written later."""


class PersistentServer:
    """A server with persistent data in `folder`. Call it from the main thread.

    It has one port until a replica takes over, which has another. Its wall clock is `clock`.
    """

    def __init__(self, folder: Path, clock: Clock) -> None:
        self.folder = folder / "node0"
        self.port = _server_port()
        self._nodes = 1
        self._root = folder
        self.clock = clock
        self._log = folder / "server.log"
        self._child: Child | None = None
        self._started = False
        self._mark: _Mark | None = None

    @property
    def url(self) -> str:
        """The address without any proxy."""
        return f"redis://127.0.0.1:{self.port}"

    async def start(self, load_s: float = 0.0) -> None:
        """Start the process and wait until it has loaded its data and replies.

        It takes about `load_s` seconds to load many keys, and replies LOADING meanwhile.
        """
        delay_us = int(load_s * 1e6 / max(1, self._commands())) if load_s else 0
        self._child = self._spawn(self.port, self.folder, "--key-load-delay", str(delay_us))
        await self._wait_for_start(self.port, self._child)
        if delay_us:
            async with Redis.from_url(self.url, protocol=2) as redis:
                await redis.config_set("key-load-delay", 0)
        self._started = True

    def _spawn(self, port: int, folder: Path, *more: str) -> Child:
        binary = server_binary()
        assert binary is not None, "no server binary found; install the extra `embedded`"
        folder.mkdir(exist_ok=True)
        options = ["--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder), "--save", ""]
        # During an fsync a server may reply before it writes, so that a kill loses acknowledged
        # writes. Without fsync a kill loses nothing, and only `lose_last_second` does.
        options += ["--appendonly", "yes", "--appendfsync", "no", "--auto-aof-rewrite-percentage", "0"]
        options += ["--repl-diskless-sync-delay", "0", *more]
        with self._log.open("ab") as log:
            return Child([*(self.clock.command), binary, *options], log)

    async def _wait_for_start(self, port: int, child: Child) -> None:
        async with asyncio.timeout(_START_S):
            while not await asyncio.to_thread(_replies, port):
                if child.ended:
                    raise RuntimeError(f"the server did not start: {self._log.read_text(errors='replace')[-1000:]}")
                await asyncio.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL."""
        assert self._child is not None, "kill() before start()"
        self._started = False
        self._child.process.kill()
        self._child.stop()

    def mark(self) -> None:
        """Record where the file ends now. Call it each second.

        Nothing is written to the file: the server opens some of its files without O_APPEND, and
        would write over the beginning of what another process has appended.
        """
        for path in self._files() if self._started else ():
            now = time.time()
            with contextlib.suppress(FileNotFoundError):  # the server has replaced it
                self._mark = _Mark(path, path.stat().st_size, now)

    def lose_last_second(self) -> LostWrites:
        """Truncate the file at the last mark, which is up to about a second old.

        A command that is cut off there is removed by the server when it starts.
        """
        mark = self._mark
        if mark is None or [mark.path] != self._files() or mark.path.stat().st_size <= mark.size:
            return LostWrites(0, math.inf)
        lost = LostWrites(mark.path.stat().st_size - mark.size, mark.time)
        os.truncate(mark.path, mark.size)
        return lost

    def _files(self) -> list[Path]:
        """The append-only file that is being written, if there is one."""
        files = self.folder.glob("appendonlydir/*.incr.aof")
        return sorted(files, key=lambda path: int(path.name.split(".")[-3]))[-1:]

    def _commands(self) -> int:
        return sum(path.read_bytes().count(b"\r\n*") for path in self._files())

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

    async def close_clients(self) -> None:
        """Close every connection of a client."""
        async with Redis.from_url(self.url, protocol=2) as redis:
            for kind in ("normal", "pubsub"):
                await redis.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")

    async def flush(self) -> None:
        """Delete all keys."""
        async with Redis.from_url(self.url, protocol=2) as redis:
            await redis.flushall()

    async def fail_over(self, seconds: float) -> Child:
        """Replace the server by a replica that has all its data, in `seconds` or more.

        Meanwhile the former one, which is returned, is a replica itself: it serves reads and refuses
        writes (READONLY). Stop it when clients have been directed to the new `port`.
        """
        former, port, folder = self._child, _server_port(), self._root / f"node{self._nodes}"
        assert former is not None, "fail_over() before start()"
        self._nodes += 1
        replica = self._spawn(port, folder, "--replicaof", "127.0.0.1", str(self.port))
        await self._wait_for_start(port, replica)
        new = Redis.from_url(f"redis://127.0.0.1:{port}", protocol=2)
        async with Redis.from_url(self.url, protocol=2) as old, new, asyncio.timeout(_FAIL_OVER_S):
            while not _is_in_sync(await new.info("all")):
                await asyncio.sleep(0.05)
            while (await new.info("replication"))["role"] != "master":
                with contextlib.suppress(ResponseError):  # the replica is not connected, or it is in progress
                    await old.execute_command("FAILOVER", "TO", "127.0.0.1", port)
                await asyncio.sleep(0.05)
        self._child, self.port, self.folder = replica, port, folder
        await asyncio.sleep(seconds)
        return former

    def stop(self) -> None:
        """End the process. Does nothing if it was not started."""
        if self._child is not None:
            self._child.stop()


def _is_in_sync(info: Mapping[str, Any]) -> bool:
    """Whether a replica has received all data and writes its own append-only file."""
    synced = info["role"] == "slave" and info["master_link_status"] == "up" and not info["master_sync_in_progress"]
    return synced and info["aof_enabled"] and not info["aof_rewrite_in_progress"] and not info["aof_rewrite_scheduled"]


def _replies(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.5) as link:
        link.sendall(b"PING\r\n")
        return link.recv(7) == b"+PONG\r\n"
    return False
