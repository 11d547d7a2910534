"""The whole road: a `worker run` process, an embedded server, and this process as the reader. Jobs come one at a time.

Knows no engine. What travels is `worker/jobs/client.py`'s.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from worker.bench.engine import Timed
from worker.embedded import Child
from worker.errors import Internal
from worker.jobs.client import Client
from worker.jobs.reader import JobFailed

READY_S = 180.0
_IDLE_S = 60.0
_POLL_S = 0.05
_PAUSE_S = 0.02
"""Between jobs, so that the worker has settled the last one and waits for the next."""


@dataclass(frozen=True, slots=True)
class Jobs:
    """What to send: `first_tokens` jobs of one token, then `answers` jobs of `tokens`, all after `prompt` tokens."""

    prompt: int
    first_tokens: int
    answers: int
    tokens: int


@contextmanager
def worker_process(path: Path, url: str, options: Sequence[str]) -> Iterator[tuple[Child, IO[bytes]]]:
    """A worker of the server at `url`, and what it logs; it loads its model yet."""
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-m", "worker", "run", "--model", str(path), "--redis-url", url, *options]
        command += ["--queue", "default", "--name", "bench", "--grace", "0", "--http-port", "0", "--log-level", "error"]
        child = Child(command, log)
        try:
            yield child, log
        finally:
            child.stop()


def measure(
    path: Path, url: str, options: Sequence[str], jobs: Jobs, prompt: Callable[[int], list[int]]
) -> tuple[list[float], list[Timed]]:
    """Seconds from before each XADD to the first token at the reader; and those of whole answers.

    Raises Internal with the worker's own words where it does not come up, or fails a job.
    """
    with worker_process(path, url, options) as (child, log):
        try:
            return asyncio.run(_measure(url, child, jobs, prompt))
        except (JobFailed, TimeoutError) as error:
            log.seek(0)
            said = log.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise Internal(f"the worker process failed: {error}: {said or 'it said nothing'}") from error


async def _measure(
    url: str, child: Child, jobs: Jobs, prompt: Callable[[int], list[int]]
) -> tuple[list[float], list[Timed]]:
    async with Client.from_url(url) as client:
        await _ready(client, child)
        await _answer(client, prompt(jobs.prompt), jobs.tokens)  # warms up
        first = [(await _answer(client, prompt(jobs.prompt), 1))[0] for _ in range(jobs.first_tokens)]
        return first, [await _answer(client, prompt(jobs.prompt), jobs.tokens) for _ in range(jobs.answers)]


async def _ready(client: Client, child: Child) -> None:
    deadline = time.monotonic() + READY_S
    while not any(status.get("state") == "ready" for status in (await client.workers()).values()):
        if child.ended or time.monotonic() > deadline:
            raise TimeoutError("it did not become ready")
        await asyncio.sleep(_POLL_S)


async def _answer(client: Client, prompt: list[int], tokens: int) -> Timed:
    """Ask, and read to the end."""
    await asyncio.sleep(_PAUSE_S)
    began = time.perf_counter()
    job_id = await client.submit(prompt_tokens=prompt, max_tokens=tokens, temperature=0, ignore_eos=True)
    first = last = 0.0
    async for _ in client.tokens(job_id, idle_s=_IDLE_S):
        last = time.perf_counter()
        first = first or last
    return first - began, (last - first) / max(1, tokens - 1)
