"""The proxy of the tests' servers."""

from __future__ import annotations

import asyncio

from tests.jobs.proxy import Proxy


async def test_a_proxy_that_closes_while_it_connects_reports_nothing(monkeypatch):
    connecting, reported = asyncio.Event(), []
    connect = asyncio.open_connection

    async def hanging(*args):
        connecting.set()
        await asyncio.sleep(60)

    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["message"]))
    proxy = Proxy(1)
    await proxy.open()
    monkeypatch.setattr(asyncio, "open_connection", hanging)
    _, writer = await connect("127.0.0.1", proxy.port)
    await connecting.wait()
    await proxy.close()
    writer.close()
    assert reported == []
