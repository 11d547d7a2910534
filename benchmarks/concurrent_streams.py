"""CPU time of a worker for each token while many jobs run at once, with the echo model.

    python -m benchmarks.concurrent_streams [--jobs 64] [--tokens 1000] [--step-ms 5]

Server and worker are separate processes on the loopback interface; no client reads while the
worker is measured, so that readers take no core from it. The time of the event loop's thread and of
the engine's thread is printed for each token, from the kernel's accounting of threads.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Mapping

import psutil
from redis.asyncio import Redis

from worker.embedded import Child, embedded_server
from worker.jobs.client import Client
from worker.jobs.keys import state_key

READY_S = 60.0
LIMIT_S = 120.0
PROMPT = "0123456789" * 3


def thread_s(process: psutil.Process) -> dict[str, float]:
    """CPU seconds of the event loop's thread, of all others and of both."""
    times = {thread.id: thread.user_time + thread.system_time for thread in process.threads()}
    loop = times[process.pid]
    return {"event loop": loop, "engine": sum(times.values()) - loop, "worker": sum(times.values())}


async def run_jobs(client: Client, redis: Redis, jobs: int, tokens: int) -> None:
    """Submit the jobs and wait for their ends, without a read of their events."""
    names = [f"{tokens}-{number}" for number in range(jobs)]
    for name in names:
        await client.submit(job_id=name, prompt=PROMPT, max_tokens=tokens)
    async with asyncio.timeout(LIMIT_S):
        for name in names:
            while await redis.hget(state_key(name), "state") != b"end":
                await asyncio.sleep(0.1)


async def measure(url: str, worker: psutil.Process, jobs: int, tokens: int) -> None:
    """Print one line: rates, and microseconds of CPU time for each token."""
    async with Client.from_url(url) as client, Redis.from_url(url, protocol=2) as redis:
        async with asyncio.timeout(READY_S):
            while not await client.workers():
                await asyncio.sleep(0.05)
        await run_jobs(client, redis, jobs, 20)  # warm-up
        before, began = thread_s(worker), time.perf_counter()
        await run_jobs(client, redis, jobs, tokens)
        seconds, after = time.perf_counter() - began, thread_s(worker)
        print(report(jobs, tokens, seconds, {name: after[name] - before[name] for name in before}))


def report(jobs: int, tokens: int, seconds: float, cpu_s: Mapping[str, float]) -> str:
    """Format the figures as one line."""
    count = jobs * tokens
    shares = ", ".join(f"{name} {1e6 * value / count:.1f} µs" for name, value in cpu_s.items())
    return f"{jobs} jobs of {tokens} tokens: {count / seconds:,.0f} tokens/s; CPU time a token: {shares}"


def main() -> None:
    """Parse the arguments, start server and worker, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--step-ms", type=float, default=5.0)
    arguments = parser.parse_args()
    with embedded_server() as url, tempfile.TemporaryFile() as log:
        options = ["--redis-url", url, "--http-port", "0", "--log-level", "error"]
        options += ["--max-running", str(arguments.jobs), "--echo-step-ms", str(arguments.step_ms)]
        worker = Child([sys.executable, "-m", "worker", "run", "--echo", *options], log)
        try:
            asyncio.run(measure(url, psutil.Process(worker.process.pid), arguments.jobs, arguments.tokens))
        finally:
            worker.stop()


if __name__ == "__main__":
    main()
