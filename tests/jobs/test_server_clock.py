"""The server's clock is read rarely, and again after a reconnection."""

from __future__ import annotations

import time

import pytest

from worker.jobs.streams import Disconnected, ServerClock


class Server:
    """A server whose clock is `ahead_ms` ahead of the local one."""

    def __init__(self, ahead_ms=5000):
        self.ahead_ms, self.calls, self.reconnects, self.unreachable = ahead_ms, 0, 0, False

    async def time_ms(self):
        self.calls += 1
        if self.unreachable:
            raise Disconnected("unreachable")
        return int(time.monotonic() * 1000) + self.ahead_ms


@pytest.fixture
def server():
    return Server()


def offset_ms(ms):
    return ms - time.monotonic() * 1000


async def test_one_read_serves_many_jobs(server):
    clock = ServerClock(server)
    assert all([abs(offset_ms(await clock.now_ms()) - 5000) < 1000 for _ in range(9)])
    assert server.calls == 1


async def test_a_reconnection_may_be_to_another_server(server):
    clock = ServerClock(server)
    await clock.now_ms()
    server.reconnects, server.ahead_ms = 1, 90_000
    assert abs(offset_ms(await clock.now_ms()) - 90_000) < 1000


async def test_an_idle_worker_refreshes_the_clock_early(server, monkeypatch):
    clock, now = ServerClock(server), time.monotonic
    await clock.refresh()
    await clock.refresh()
    assert server.calls == 1
    monkeypatch.setattr("worker.jobs.streams.time.monotonic", lambda: now() + 6)
    await clock.refresh()
    assert server.calls == 2
    await clock.now_ms()
    assert server.calls == 2
    monkeypatch.setattr("worker.jobs.streams.time.monotonic", lambda: now() + 17)
    await clock.now_ms()
    assert server.calls == 3


async def test_refreshing_from_an_unreachable_server_raises_nothing(server):
    server.unreachable = True
    await ServerClock(server).refresh()
    assert server.calls == 1
