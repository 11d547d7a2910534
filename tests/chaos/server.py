"""The server of a run: it keeps an append-only file, may be killed and started again, and may lose its last second."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path

from worker.embedded import Child, free_port, server_binary

_START_S = 20.0


class KeepingServer:
    """A server on one port, whose data in `folder` outlives it. All calls from the main thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self._child: Child | None = None

    async def start(self) -> None:
        """Returns when it answers, its data loaded."""
        binary = server_binary()
        assert binary is not None, "there is no server binary; the extra `embedded` has one"
        options = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder), "--save", ""]
        options += ["--appendonly", "yes", "--appendfsync", "everysec", "--auto-aof-rewrite-percentage", "0"]
        self._child = Child([binary, *options, "--aof-timestamp-enabled", "yes"])
        async with asyncio.timeout(_START_S):
            while not self._answers():
                assert not self._child.ended, "the server did not start"
                await asyncio.sleep(0.01)

    async def kill(self) -> None:
        """SIGKILL, at a moment when all that it has answered is in the file.

        While a sync of the file is under way it answers first and writes later, and what was lost of that nobody would
        have noted. Losing writes is `lose_last_second`'s.
        """
        assert self._child is not None, "it was started"
        async with asyncio.timeout(_START_S):
            while not self._has_written_all():
                await asyncio.sleep(0.001)
        self._child.process.kill()
        self._child.stop()

    def lose_last_second(self) -> int:
        """Cut the file at its last time mark, as if the rest had never reached the disk; how many bytes are gone."""
        lost = 0
        for path in self.folder.glob("appendonlydir/*.incr.aof"):
            kept = path.read_bytes()
            mark = kept.rfind(b"#TS:")
            if mark > 0:
                lost += len(kept) - mark
                path.write_bytes(kept[:mark])
        return lost

    def stop(self) -> None:
        """End it. Harmless if it never started."""
        if self._child is not None:
            self._child.stop()

    def _answers(self) -> bool:
        return self._said(b"PING") == b"+PONG\r\n"

    def _has_written_all(self) -> bool:
        said = self._said(b"INFO persistence")
        return b"aof_pending_bio_fsync:0\r\n" in said and b"aof_buffer_length:0\r\n" in said

    def _said(self, command: bytes) -> bytes:
        """The short answer to a command; nothing where there is none."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 0.5) as link:
            link.sendall(command + b"\r\n")
            return link.recv(1 << 16)
        return b""
