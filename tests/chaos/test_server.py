"""The server of a run can start again on its port, and reports what it lost."""

from __future__ import annotations

import math
from pathlib import Path

from tests.chaos.clock import Clock
from tests.chaos.server import LostWrites, PersistentServer

RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def server_in(folder: Path) -> PersistentServer:
    return PersistentServer(folder, Clock(None, folder / "clock"))


def test_the_port_is_none_that_the_system_gives_to_connections(tmp_path: Path) -> None:
    lowest = int(RANGE.read_text().split()[0]) if RANGE.exists() else 32_768
    ports = [server_in(tmp_path).port for _ in range(20)]
    assert [port for port in ports if port >= lowest] == []


def test_lost_writes_begin_at_the_last_timestamp_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "node0" / "appendonlydir" / "appendonly.aof.1.incr.aof"
    path.parent.mkdir(parents=True)
    kept, lost = b"#TS:1700000000\r\n*1\r\n$4\r\nPING\r\n", b"#TS:1700000005\r\n*1\r\n$4\r\nPING\r\n"
    path.write_bytes(kept + lost)
    server = server_in(tmp_path)
    assert server.lose_last_second() == LostWrites(len(lost), 1_700_000_005)
    assert path.read_bytes() == kept
    assert server.lose_last_second() == LostWrites(0, math.inf), "the first timestamp begins the file"
