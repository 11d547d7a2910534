"""An orchestrator ends while its jobs are unfinished, those of synchronous readers too."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.chaos import orchestrator as module
from tests.chaos.orchestrator import Orchestrator
from tests.chaos.run_log import RunLog
from tests.chaos.workload import Case
from worker.embedded import embedded_server

CASE = Case({"prompt_tokens": [1], "max_tokens": 4}, (), (), "", None)


async def test_close_ends_threads_that_wait_for_a_server_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KINDS", {"synchronous": 1})
    readers = 12  # more than the event loop's own executor has threads, which the server's start needs
    with embedded_server() as url:
        orchestrator = Orchestrator("o", "queue", url, [CASE], RunLog(), readers)
        running = asyncio.create_task(orchestrator.run(time.monotonic() + 60))
        async with asyncio.timeout(30):
            while orchestrator.reading_in_threads < readers:
                await asyncio.sleep(0.02)
            assert await asyncio.to_thread(lambda: "executed"), "the loop's executor is free"
    running.cancel()
    async with asyncio.timeout(20):
        await orchestrator.close()
    assert orchestrator.reading_in_threads == 0
