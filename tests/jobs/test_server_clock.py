"""The server's clock is asked for seldom, and again after another connection."""

from __future__ import annotations

import time

import pytest

from worker.jobs.streams import Disconnected, ServerClock


class Server:
    """Its clock is `ahead_ms` of ours."""

    def __init__(self, ahead_ms=5000):
        self.ahead_ms, self.asked, self.reconnects, self.away = ahead_ms, 0, 0, False

    async def time_ms(self):
        self.asked += 1
        if self.away:
            raise Disconnected("away")
        return int(time.monotonic() * 1000) + self.ahead_ms


@pytest.fixture
def server():
    return Server()


def lead_of(ms):
    return ms - time.monotonic() * 1000


async def test_the_server_is_asked_once_for_many_jobs(server):
    clock = ServerClock(server)
    assert all([abs(lead_of(await clock.now_ms()) - 5000) < 1000 for _ in range(9)])
    assert server.asked == 1


async def test_another_connection_may_be_another_server(server):
    clock = ServerClock(server)
    await clock.now_ms()
    server.reconnects, server.ahead_ms = 1, 90_000
    assert abs(lead_of(await clock.now_ms()) - 90_000) < 1000


async def test_an_idle_worker_asks_before_it_must(server, monkeypatch):
    clock, now = ServerClock(server), time.monotonic
    await clock.refresh()
    await clock.refresh()
    assert server.asked == 1
    monkeypatch.setattr("worker.jobs.streams.time.monotonic", lambda: now() + 6)
    await clock.refresh()
    assert server.asked == 2
    await clock.now_ms()
    assert server.asked == 2
    monkeypatch.setattr("worker.jobs.streams.time.monotonic", lambda: now() + 17)
    await clock.now_ms()
    assert server.asked == 3


async def test_a_server_that_is_away_while_idle_is_no_fault(server):
    server.away = True
    await ServerClock(server).refresh()
    assert server.asked == 1
