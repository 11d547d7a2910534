"""A real master with a replica, and three sentinels that fail it over, on loopback ports."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from redis import Redis

from tests.jobs.cluster import wait_for
from tests.jobs.servers import Server

SERVICE = "jobs"
DOWN_AFTER_MS = 500


class MonitoredServers:
    """`servers` has the master first, at the start."""

    def __init__(self, folder: str, *options: str) -> None:
        options = ("--repl-diskless-sync-delay", "0", *options)
        self.servers = [Server(self._folder(folder, f"server-{n}"), *options) for n in range(2)]
        self.sentinels = [self._sentinel(self._folder(folder, f"sentinel-{n}")) for n in range(3)]

    @staticmethod
    def _folder(parent: str, name: str) -> str:
        path = Path(parent) / name
        path.mkdir()
        return str(path)

    def _sentinel(self, folder: str) -> Server:
        port = self.servers[0].port
        lines = [f"sentinel monitor {SERVICE} 127.0.0.1 {port} 2"]
        lines += [f"sentinel down-after-milliseconds {SERVICE} {DOWN_AFTER_MS}"]
        lines += [f"sentinel failover-timeout {SERVICE} 5000"]
        path = Path(folder) / "sentinel.conf"
        path.write_text("\n".join(lines) + "\n")
        return Server(folder, "--sentinel", config=path)

    @property
    def url(self) -> str:
        addresses = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{addresses}/{SERVICE}/0"

    def run(self, server: Server, *command: Any) -> Any:
        with Redis(port=server.port, protocol=2, decode_responses=True) as admin:
            return admin.execute_command(*command)

    def start(self) -> None:
        master, replica = self.servers
        master.start()
        replica.start()
        self.run(replica, "REPLICAOF", "127.0.0.1", master.port)
        for sentinel in self.sentinels:
            sentinel.start()
        wait_for(lambda: self.run(replica, "ROLE")[3] == "connected")
        wait_for(lambda: all(self._sees(sentinel) == (1, 2) for sentinel in self.sentinels))

    def _sees(self, sentinel: Server) -> tuple[int, int]:
        """Replicas and other sentinels that a sentinel knows."""
        with Redis(port=sentinel.port, protocol=2, decode_responses=True) as admin:
            state = admin.sentinel_master(SERVICE)
        return int(state["num-slaves"]), int(state["num-other-sentinels"])

    def stop(self) -> None:
        for server in (*self.sentinels, *self.servers):
            server.stop()


@contextlib.contextmanager
def monitored_servers(*options: str) -> Iterator[MonitoredServers]:
    with tempfile.TemporaryDirectory() as folder:
        servers = MonitoredServers(folder, *options)
        try:
            servers.start()
            yield servers
        finally:
            servers.stop()
