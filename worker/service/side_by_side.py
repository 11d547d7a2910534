"""Coroutines that run side by side: the first one to end decides, and those that serve on the side never end it.

Knows nothing of workers; see `service.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, TypeVar

from worker.errors import CudaError
from worker.telemetry import Log, frames_of

T = TypeVar("T")

_CUT_OFF_S = 1.0


async def first_of(*works: Coroutine[Any, Any, T]) -> T:
    """What the first of them to end returns or raises; the others are cancelled, and waited for a moment."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(task for task in tasks if task in done).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=_CUT_OFF_S)


async def for_ever(work: Callable[[], Coroutine[Any, Any, None]], pause_s: float, log: Log) -> NoReturn:
    """Run `work` again and again, whatever it raises, but for CudaError: then the device is lost for everybody."""
    while True:
        try:
            await work()
        except CudaError:
            raise
        except Exception as error:
            log.error("side_fault", frames=frames_of(error))
        await asyncio.sleep(pause_s)
