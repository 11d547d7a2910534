"""Reading an engine thread's inbox in a test."""

from __future__ import annotations

import asyncio

from worker.service.engine_thread import Inbox, TimedToken


async def read_inbox(inbox: Inbox, woken: asyncio.Event, count: int) -> list[TimedToken | Exception]:
    """The next `count` items; the inbox's `wake` sets `woken`."""
    items: list[TimedToken | Exception] = []
    while len(items) < count:
        await asyncio.wait_for(woken.wait(), 10)
        woken.clear()
        items += inbox.take()
    return items
