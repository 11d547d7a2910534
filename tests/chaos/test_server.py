"""The server of a run can start again on its port, and reports what it lost."""

from __future__ import annotations

import math
import time
from pathlib import Path

from redis.asyncio import Redis

from tests.chaos.clock import Clock
from tests.chaos.server import LostWrites, PersistentServer

RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def server_in(folder: Path) -> PersistentServer:
    return PersistentServer(folder, Clock(None, folder / "clock"))


def test_the_port_is_none_that_the_system_gives_to_connections(tmp_path: Path) -> None:
    lowest = int(RANGE.read_text().split()[0]) if RANGE.exists() else 32_768
    ports = [server_in(tmp_path).port for _ in range(20)]
    assert [port for port in ports if port >= lowest] == []


async def test_lost_writes_are_those_after_the_last_mark(tmp_path: Path) -> None:
    server = server_in(tmp_path)
    assert server.lose_last_second() == LostWrites(0, math.inf), "nothing was marked"
    await server.start()
    try:
        async with Redis.from_url(server.url, protocol=2) as redis:
            await redis.set("kept", 1)
            before = time.time()
            server.mark()
            after = time.time()
            await redis.set("lost", 1)
        server.kill()
        lost = server.lose_last_second()
        assert before <= lost.since <= after
        assert lost.size > 0
        assert server.lose_last_second() == LostWrites(0, math.inf), "the file ends at the mark"
        await server.start()
        async with Redis.from_url(server.url, protocol=2) as redis:
            assert await redis.keys("*") == [b"kept"]
    finally:
        server.stop()
