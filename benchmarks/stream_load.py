"""Clients of a benchmark in their own processes: each slot submits a job, reads it, and repeats.

`LoadProcesses.run` divides the slots of a `Load` among the processes. Times are of
`time.monotonic`, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Self

from worker.jobs.client import Client
from worker.jobs.events import Token
from worker.jobs.reader import JobFailed

_BEFORE_S = 0.003
"""After which a reader waits at the server, before its job is submitted."""
_GRACE_S = 20.0
"""For which a process may run on after `until`."""


@dataclass(frozen=True)
class Load:
    """Jobs with random prompts that share no prefix, in `slots` at a time."""

    name: str
    """First part of the jobs' ids."""
    slots: int
    prompt_tokens: int
    ids: range
    """Of the prompts' tokens; see `text_ids`."""
    tokens: tuple[int, int]
    """Smallest and greatest number of tokens of an answer; drawn uniformly."""
    until: float
    """When the last job is submitted at the latest; running ones are cancelled."""
    pause_s: float = 0.0
    """Mean pause of a slot between two jobs."""
    numbers: range = range(0)
    """Numbers of the slots that a process runs; set by `LoadProcesses`."""


def text_ids(vocab_size: int) -> range:
    """Ids for random prompts: control tokens are at one end of a vocabulary."""
    return range(vocab_size // 4, vocab_size * 3 // 4)


@dataclass(frozen=True)
class StreamTimes:
    """What a reader has seen of one job."""

    submitted: float
    arrivals: tuple[tuple[float, int], ...]
    """When tokens arrived, and how many together."""


class LoadProcesses:
    """A number of processes that run loads against the server at `url`."""

    def __init__(self, url: str, count: int) -> None:
        self._url = url
        self._count = count
        self._pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))

    def __enter__(self) -> Self:
        for ready in [self._pool.submit(time.sleep, 0.5) for _ in range(self._count)]:  # start all
            ready.result()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._pool._processes.values():
            process.kill()
        self._pool.shutdown(cancel_futures=True)

    async def run(self, *loads: Load) -> list[list[StreamTimes]]:
        """Run loads until their ends, at once; return the jobs of each."""
        loop, count = asyncio.get_running_loop(), self._count
        shares = [[replace(load, numbers=range(n, load.slots, count)) for load in loads] for n in range(count)]
        until = max(load.until for load in loads)
        async with asyncio.timeout(until - time.monotonic() + _GRACE_S):
            calls = [loop.run_in_executor(self._pool, run_loads, self._url, share) for share in shares]
            done = await asyncio.gather(*calls)
        return [[job for process in done for job in process[n]] for n in range(len(loads))]


def run_loads(url: str, loads: Sequence[Load]) -> list[list[StreamTimes]]:
    """Run a share of each load in this process."""

    async def run() -> list[list[StreamTimes]]:
        async with Client.from_url(url) as client:
            return await asyncio.gather(*(_run_slots(client, load) for load in loads))

    return asyncio.run(run())


async def _run_slots(client: Client, load: Load) -> list[StreamTimes]:
    jobs = await asyncio.gather(*(_run_slot(client, load, number) for number in load.numbers))
    return [job for each in jobs for job in each]


async def _run_slot(client: Client, load: Load, slot: int) -> list[StreamTimes]:
    rng = random.Random(f"{load.name}-{slot}")
    jobs: list[StreamTimes] = []
    while time.monotonic() < load.until:
        job_id = f"{load.name}-{slot}-{len(jobs)}"
        prompt = rng.choices(load.ids, k=load.prompt_tokens)
        jobs.append(await _follow(client, job_id, prompt, rng.randint(*load.tokens), load.until))
        await asyncio.sleep(rng.uniform(0, 2 * load.pause_s))
    return jobs


async def _follow(client: Client, job_id: str, prompt: Sequence[int], tokens: int, until: float) -> StreamTimes:
    """Submit a job and read it; cancel it at `until`."""
    arrivals: list[tuple[float, int]] = []

    async def read() -> None:
        with contextlib.suppress(JobFailed):  # cancelled
            async for page in client.event_pages(job_id):
                now = time.monotonic()
                if count := sum(isinstance(item.event, Token) for item in page):
                    arrivals.append((now, count))

    reading = asyncio.create_task(read())
    await asyncio.sleep(_BEFORE_S)
    submitted = time.monotonic()
    await client.submit(
        job_id=job_id, prompt_tokens=list(prompt), max_tokens=tokens, temperature=0.0, ignore_eos=True, seed=1
    )
    try:
        async with asyncio.timeout(until - submitted):
            await asyncio.shield(reading)
    except TimeoutError:
        await client.cancel(job_id)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GRACE_S / 2):
                await reading
    return StreamTimes(submitted, tuple(arrivals))
