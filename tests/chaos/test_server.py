"""The server of a run can start again on its port, whatever connects meanwhile."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.server import PersistentServer

RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def test_the_port_is_none_that_the_system_gives_to_connections(tmp_path: Path) -> None:
    lowest = int(RANGE.read_text().split()[0]) if RANGE.exists() else 32_768
    assert [port for port in (PersistentServer(tmp_path).port for _ in range(20)) if port >= lowest] == []
