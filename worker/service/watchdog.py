"""Notices an engine that hangs: it has work and ends no step. Replayed and prefill steps count as any other."""

from __future__ import annotations

import asyncio
import time

from worker.service.engine_thread import EngineThread

_TICK_S = 1.0


async def stalled(engine: EngineThread, stall_s: float) -> None:
    """Return when the engine has ended no step for `stall_s` seconds though it has work.

    Time is counted in ticks, so that a process that was stopped as a whole does not wake up to its own death.
    """
    tick_s = min(_TICK_S, stall_s / 4)
    quiet_s, steps = 0.0, engine.steps
    while quiet_s < stall_s:
        began = time.monotonic()
        await asyncio.sleep(tick_s)
        passed_s = min(time.monotonic() - began, 2 * tick_s)
        quiet_s = quiet_s + passed_s if engine.busy and engine.steps == steps else 0.0
        steps = engine.steps
