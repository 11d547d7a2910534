"""Reading an engine thread's inbox in a test."""

from __future__ import annotations

import asyncio

from worker.service.engine_thread import Inbox, TimedToken


async def read_inbox(inbox: Inbox, woken: asyncio.Event, count: int) -> list[TimedToken]:
    """The next `count` tokens, or those before an error; the inbox's `wake` sets `woken`."""
    items: list[TimedToken] = []
    while len(items) < count and inbox.error is None:
        await asyncio.wait_for(woken.wait(), 10)
        woken.clear()
        items += inbox.take()
    return items + inbox.take()
