"""Concurrent readers of one client: 500 readers, 500 submissions at once, 200 cancels, one worker.

    python -m benchmarks.readers

Server, worker (echo) and client are separate processes. Every call must succeed. The reference is
the latency of the same events with a single reader.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from statistics import median, quantiles

import psutil
from redis.asyncio import Redis

from worker.embedded import Child, embedded_server
from worker.jobs.client import Client
from worker.jobs.events import Token
from worker.jobs.reader import JobFailed

READERS, CANCELS, TOKENS, SINGLE_JOBS = 500, 200, 20, 100
READY_S = 60.0


async def read(client: Client, job_id: str, delays_ms: list[float]) -> str:
    """Read a job to its end; note the time from the writing of each event to its arrival."""
    tokens = 0
    try:
        async for item in client.events(job_id):
            delays_ms.append(time.time() * 1000 - item.envelope.ts_ms)
            tokens += isinstance(item.event, Token)
    except JobFailed as failed:
        return failed.error.code
    return "complete" if tokens == TOKENS else "cancelled"


async def single(client: Client) -> list[float]:
    """Delays with one reader at a time."""
    delays_ms: list[float] = []
    for number in range(SINGLE_JOBS):
        job_id = f"single-{number}"
        reading = asyncio.create_task(read(client, job_id, delays_ms))
        await client.submit(job_id=job_id, prompt="0123456789", max_tokens=TOKENS)
        await reading
    return delays_ms


async def many(client: Client, raw: Redis) -> None:
    """All readers wait before the first job is submitted; the last jobs are cancelled."""
    jobs = [f"many-{number}" for number in range(READERS)]
    delays_ms: list[float] = []
    before = (await raw.info("commandstats")).get("cmdstat_xread", {}).get("calls", 0)
    cpu, began = psutil.Process().cpu_times(), time.perf_counter()
    readers = [asyncio.create_task(read(client, job_id, delays_ms)) for job_id in jobs]
    await asyncio.sleep(0.2)
    connections = len([each for each in await raw.client_list() if each["cmd"] == "xread"])
    at = time.perf_counter()
    await asyncio.gather(*(client.submit(job_id=job, prompt="0123456789", max_tokens=TOKENS) for job in jobs))
    submit_s, at = time.perf_counter() - at, time.perf_counter()
    outcomes = await asyncio.gather(*map(client.cancel, jobs[-CANCELS:]))
    cancel_s = time.perf_counter() - at
    await asyncio.gather(*readers)
    seconds, now = time.perf_counter() - began, psutil.Process().cpu_times()
    calls = (await raw.info("commandstats"))["cmdstat_xread"]["calls"] - before
    share = (now.user + now.system - cpu.user - cpu.system) / seconds
    print(f"{READERS} readers           {connections} blocked connections, {calls:,} XREAD, {len(delays_ms):,} events")
    print(f"{READERS} submissions       {submit_s * 1000:,.0f} ms together")
    counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in sorted(set(outcomes)))
    print(f"{CANCELS} cancels           {cancel_s * 1000:,.0f} ms together: {counts}")
    print(f"events                {_spread(delays_ms)}; {seconds:.1f} s, {share:.0%} of a core")


def _spread(delays_ms: list[float]) -> str:
    return f"median {median(delays_ms):.1f} ms, 99 % within {quantiles(delays_ms, n=100)[-1]:.1f} ms after writing"


async def measure(url: str) -> None:
    """Print the figures of a server whose worker starts now."""
    async with Client.from_url(url) as client, Redis.from_url(url, protocol=2) as raw:
        async with asyncio.timeout(READY_S):
            while not await client.workers():
                await asyncio.sleep(0.05)
        print(f"one reader at a time  {_spread(await single(client))}")
        await many(client, raw)


def main() -> None:
    """Start a server and an echo worker, and measure."""
    with embedded_server() as url, tempfile.TemporaryFile() as log:
        options = ["--echo-step-ms", "1", "--redis-url", url, "--http-port", "0", "--log-level", "error"]
        worker = Child([sys.executable, "-m", "worker", "run", "--echo", *options], log)
        try:
            asyncio.run(measure(url))
        finally:
            worker.stop()


if __name__ == "__main__":
    main()
