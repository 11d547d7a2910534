"""The wall clock of a process of a run can be set while it runs; its monotonic clock does not change."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.clock import Clock, build_library
from tests.chaos.server import PersistentServer
from worker.jobs.redis_streams import RedisStreams

HOUR_MS = 3_600_000
PRINT = "import time; input(); print(time.time(), time.monotonic()); input(); print(time.time(), time.monotonic())"


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    return Clock(build_library(tmp_path), tmp_path / "clock")


def test_the_clock_of_a_python_process_is_set_while_it_runs(clock: Clock) -> None:
    command = [*map(str, clock.command), sys.executable, "-u", "-c", PRINT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        read = []
        for ahead_s in (0, -3600):
            clock.set(ahead_s)
            process.stdin.write("\n")
            process.stdin.flush()
            read.append([float(word) for word in process.stdout.readline().split()])
    (wall, monotonic), (later_wall, later_monotonic) = read
    assert -3600 <= later_wall - wall < -3500
    assert 0 <= later_monotonic - monotonic < 100


async def test_the_clock_of_a_server_is_set_while_it_runs(clock: Clock, tmp_path: Path) -> None:
    server = PersistentServer(tmp_path, clock)
    try:
        await server.start()
        streams = RedisStreams.from_url(server.url)
        before = await streams.time_ms()
        for hours in (1, -1):
            clock.set(hours * 3600)
            async with asyncio.timeout(30):  # the server reads its clock once in a while
                while not 0 <= await streams.time_ms() - before - hours * HOUR_MS < 100_000:
                    await asyncio.sleep(0)
        await streams.close()
    finally:
        server.stop()
