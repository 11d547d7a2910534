"""A real cluster: three masters, and with `replicas` one replica of each, on loopback ports."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from redis import Redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import RedisError

from tests.jobs.servers import Server, free_port

NODE_TIMEOUT_MS = 1000
"""A master is failed over after about twice this time."""


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Wait until the condition holds; an unreachable node counts as a condition that does not."""
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(RedisError):
            if condition():
                return
        assert time.monotonic() < deadline, f"not true after {timeout_s:g} s"
        time.sleep(0.05)


class ClusterServer:
    """The nodes; the first three are masters at the start."""

    def __init__(self, folder: str, replicas: bool, *options: str) -> None:
        self.nodes = [self._node(folder, n, *options) for n in range(6 if replicas else 3)]
        self._replicas = replicas

    @staticmethod
    def _node(folder: str, number: int, *options: str) -> Server:
        cluster = ("--cluster-enabled", "yes", "--cluster-config-file", f"nodes-{number}.conf")
        cluster += ("--cluster-node-timeout", str(NODE_TIMEOUT_MS), "--cluster-port", str(free_port()))
        cluster += ("--cluster-replica-validity-factor", "0", "--repl-diskless-sync-delay", "0")
        return Server(folder, *cluster, *options)

    @property
    def url(self) -> str:
        """Names two of the nodes."""
        return f"redis+cluster://127.0.0.1:{self.nodes[0].port},127.0.0.1:{self.nodes[1].port}"

    def admin(self, node: Server) -> Redis:
        return Redis(port=node.port, protocol=2, decode_responses=True)

    def run(self, node: Server, *command: Any) -> Any:
        with self.admin(node) as admin:
            return admin.execute_command(*command)

    def start(self) -> None:
        for node in self.nodes:
            node.start()
        masters, replicas = self.nodes[:3], self.nodes[3:]
        bounds = [n * REDIS_CLUSTER_HASH_SLOTS // 3 for n in range(4)]
        for epoch, node in enumerate(self.nodes, 1):
            self.run(node, "CLUSTER", "SET-CONFIG-EPOCH", epoch)
        for n, node in enumerate(masters):
            self.run(node, "CLUSTER", "ADDSLOTSRANGE", bounds[n], bounds[n + 1] - 1)
        for node in self.nodes[1:]:
            bus = node.option("--cluster-port")
            self.run(self.nodes[0], "CLUSTER", "MEET", "127.0.0.1", node.port, bus)
        wait_for(lambda: all(self._knows(node) == len(self.nodes) for node in self.nodes))
        for master, replica in zip(masters, replicas, strict=False):
            self.run(replica, "CLUSTER", "REPLICATE", self.id_of(master))
        wait_for(lambda: all("cluster_state:ok" in self.run(node, "CLUSTER", "INFO") for node in self.nodes))
        wait_for(lambda: all(self.run(node, "ROLE")[3] == "connected" for node in replicas))

    def _knows(self, node: Server) -> int:
        return sum("handshake" not in line for line in self.run(node, "CLUSTER", "NODES").splitlines())

    def id_of(self, node: Server) -> str:
        return str(self.run(node, "CLUSTER", "MYID"))

    def stop(self) -> None:
        for node in self.nodes:
            node.stop()

    def flush(self) -> None:
        for node in self.masters():
            self.run(node, "FLUSHALL")

    def masters(self) -> list[Server]:
        """The living nodes with slots, as the first living one reports."""
        living = next(node for node in self.nodes if node.running)
        ports = {int(entry[2][1]) for entry in self.run(living, "CLUSTER", "SLOTS")}
        return [node for node in self.nodes if node.port in ports]

    def master_of(self, key: str) -> Server:
        living = next(node for node in self.nodes if node.running)
        slot = key_slot(key.encode())
        for first, last, master, *_ in self.run(living, "CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return next(node for node in self.nodes if node.port == int(master[1]))
        raise LookupError(key)


@contextlib.contextmanager
def running_cluster(*options: str, replicas: bool = False) -> Iterator[ClusterServer]:
    with tempfile.TemporaryDirectory() as folder:
        cluster = ClusterServer(folder, replicas, *options)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
