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
        # While an fsync is under way a server answers before it writes, and a kill then loses what it has answered. To
        # lose is for `lose_last_second`, of which the ledger hears: nothing is synced here, and a kill loses nothing.
        options += ["--appendonly", "yes", "--appendfsync", "no", "--auto-aof-rewrite-percentage", "0"]
        self._child = Child([binary, *options, "--aof-timestamp-enabled", "yes"])
        async with asyncio.timeout(_START_S):
            while not self._answers():
                assert not self._child.ended, "the server did not start"
                await asyncio.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL."""
        assert self._child is not None, "it was started"
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
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 0.5) as link:
            link.sendall(b"PING\r\n")
            return link.recv(7) == b"+PONG\r\n"
        return False
