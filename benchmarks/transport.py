"""Transport overhead: jobs and tokens per second through a real server to an echo worker and back.

    python -m benchmarks.transport

Server, worker and client are separate processes; their CPU time is printed as shares of one core. A
job requires about three sequential round trips, so the reference is the rate of PING.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass

import psutil
from redis.asyncio import Redis

from worker.embedded import Child, embedded_server
from worker.jobs.client import Client
from worker.jobs.events import Token

SHORT_JOBS, LONG_JOBS, LONG_TOKENS, PINGS = 1000, 20, 4000, 5000
READY_S = 60.0


@dataclass(frozen=True, slots=True)
class Run:
    """Completed jobs with their wall and CPU time."""

    jobs: int
    tokens: int
    seconds: float
    cores: Mapping[str, float]
    """CPU time of each process divided by wall time."""

    def report(self, title: str) -> str:
        """Format as one line."""
        shares = ", ".join(f"{name} {share:.0%}" for name, share in self.cores.items())
        rates = f"{self.jobs / self.seconds:,.0f} jobs/s, {self.tokens / self.seconds:,.0f} tokens/s"
        token_us = 1e6 * self.seconds / self.tokens
        return f"{title:<26} {rates}; {token_us:.1f} µs per token; of a core: {shares}"


async def measure(client: Client, processes: Mapping[str, psutil.Process], jobs: int, max_tokens: int) -> Run:
    """Submit all jobs and read their answers concurrently."""
    before, began = _cpu_s(processes), time.perf_counter()
    reading = asyncio.create_task(_read(client, jobs, max_tokens))
    for number in range(jobs):
        await client.submit(job_id=f"{max_tokens}-{number}", prompt="0123456789", max_tokens=max_tokens)
    tokens = await reading
    seconds, after = time.perf_counter() - began, _cpu_s(processes)
    return Run(jobs, tokens, seconds, {name: (after[name] - before[name]) / seconds for name in processes})


async def _read(client: Client, jobs: int, max_tokens: int) -> int:
    tokens = 0
    for number in range(jobs):
        async for item in client.events(f"{max_tokens}-{number}"):
            tokens += isinstance(item.event, Token)
    return tokens


async def pings(url: str) -> float:
    """Return sequential round trips per second."""
    async with Redis.from_url(url, protocol=2) as redis:
        began = time.perf_counter()
        for _ in range(PINGS):
            await redis.ping()
        return PINGS / (time.perf_counter() - began)


async def compare(url: str, worker: psutil.Process) -> None:
    async with Client.from_url(url) as client:
        async with asyncio.timeout(READY_S):
            while not await client.workers():
                await asyncio.sleep(0.05)
        client_process = psutil.Process()
        server = next(child for child in client_process.children() if "server" in child.name())
        processes = {"server": server, "worker": worker, "client": client_process}
        await measure(client, processes, 20, 2)  # warm-up
        for jobs, tokens in ((SHORT_JOBS, 1), (LONG_JOBS, LONG_TOKENS)):
            print((await measure(client, processes, jobs, tokens)).report(f"{jobs} jobs of {tokens} tokens"))
        print(f"{'reference: PING':<26} {await pings(url):,.0f} round trips/s")


def main() -> None:
    with embedded_server() as url, tempfile.TemporaryFile() as log:
        options = ["--redis-url", url, "--http-port", "0", "--log-level", "error"]
        worker = Child([sys.executable, "-m", "worker", "run", "--echo", *options], log)
        try:
            asyncio.run(compare(url, psutil.Process(worker.process.pid)))
        finally:
            worker.stop()


def _cpu_s(processes: Mapping[str, psutil.Process]) -> dict[str, float]:
    return {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}


if __name__ == "__main__":
    main()
