"""Jobs per second of one echo worker at a distance from its server: sequential round trips count.

    python -m benchmarks.distant_server

The worker is connected through a proxy that delays both directions, the client directly.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import AsyncIterator

from worker.embedded import Child, embedded_server
from worker.jobs.client import Client

ROUND_TRIPS_MS, JOBS, TOKENS = (0, 5, 10), 200, 3


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
    """Copy until the end of the input, each chunk `delay_s` after its arrival."""
    clock = asyncio.get_running_loop().time
    chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def write() -> None:
        while True:
            at, chunk = await chunks.get()
            await asyncio.sleep(at - clock())
            writer.write(chunk)

    writing = asyncio.create_task(write())
    try:
        while chunk := await reader.read(65536):
            chunks.put_nowait((clock() + delay_s, chunk))
    finally:
        writing.cancel()
        writer.close()


@contextlib.asynccontextmanager
async def delayed(url: str, round_trip_ms: float) -> AsyncIterator[str]:
    """Yield the URL of a proxy of the server at `url`."""
    host, _, port = url.removeprefix("redis://").partition(":")

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        of_server, to_server = await asyncio.open_connection(host, int(port))
        directions = ((reader, to_server), (of_server, writer))
        await asyncio.gather(*(_forward(*each, round_trip_ms / 2000) for each in directions), return_exceptions=True)

    proxy = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"redis://127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
    finally:
        proxy.close()


async def jobs_per_second(url: str) -> float:
    """Submit all jobs and wait for the last one."""
    async with Client.from_url(url) as client:
        await client.result(await client.submit(prompt="abc", max_tokens=1))
        jobs = [await client.submit(prompt="abc", max_tokens=TOKENS) for _ in range(JOBS)]
        began = time.perf_counter()
        await client.result(jobs[-1])
        return JOBS / (time.perf_counter() - began)


async def measure(url: str, round_trip_ms: float) -> None:
    """Print the figures for a worker at that distance."""
    async with delayed(url, round_trip_ms) as proxy:
        with tempfile.TemporaryFile() as log:
            options = ["--redis-url", proxy, "--http-port", "0", "--log-level", "error"]
            worker = Child([sys.executable, "-m", "worker", "run", "--echo", *options], log)
            try:
                rate = await jobs_per_second(url)
                print(f"round trip {round_trip_ms:>2} ms: {rate:.0f} jobs/s, {1000 / rate:.1f} ms a job")
            finally:
                await asyncio.to_thread(worker.stop)


def main() -> None:
    """Measure at each distance, each with an empty server."""
    for round_trip_ms in ROUND_TRIPS_MS:
        with embedded_server() as url:
            asyncio.run(measure(url, round_trip_ms))


if __name__ == "__main__":
    main()
