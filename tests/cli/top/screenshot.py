"""Write docs/top.svg: `worker top` over a real server, four workers on this CPU, and their jobs.

worker pull smollm2
python -m tests.cli.top.screenshot [FILE]
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.cli.top.test_server import shows
from tests.jobs.servers import running_server
from tests.service.processes import Process
from tests.tiny_models import make_tiny
from worker.cli.top import ServerSource
from worker.cli.top.app import TopApp
from worker.jobs.client import Client
from worker.jobs.redis_streams import RedisStreams
from worker.jobs.streams import Contact

SIZE = (148, 38)
PICTURE = Path(__file__).parents[3] / "docs" / "top.svg"
JOBS = {"interactive": ("chat", 60), "batch": ("summary", 240), "small": ("label", 900)}
"""Queues, the beginning of their jobs' ids, and how many jobs each gets."""
TIMEOUT_S = 240.0


async def fill(url: str) -> None:
    """Submit jobs to all queues, a few that are refused, and payloads that can't be read."""
    streams = RedisStreams.from_url(url)
    for _ in range(3):
        await streams.enqueue("small", {"p": b"\xc1"}, 10_000)
    await streams.close()
    client = Client.from_url(url, "batch")
    for number in range(2):
        await client.submit(job_id=f"report-{number:04}", prompt="word " * 9000, deadline_ms=120_000)
    await client.close()
    random.seed(1)
    for queue, (name, count) in JOBS.items():
        client = Client.from_url(url, queue)
        for number in range(count):
            tokens = random.randint(100, 400)
            await client.submit(job_id=f"{name}-{number:04}", prompt="Once upon a time " * 3, max_tokens=tokens)
        await client.close()


async def take(url: str) -> str:
    """Wait until all workers generate; return the screen as SVG."""
    streams = RedisStreams.from_url(url, Contact(lambda _: None, lambda _: None))
    source = ServerSource(streams, url, "interactive", [], 10_000)
    app = TopApp(source, await source.read())
    async with app.run_test(size=SIZE) as pilot:
        await pilot.press("1")
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            speeds = [row.tokens_per_second or 0 for row in app.snapshot.workers]
            if len(speeds) == 4 and min(speeds) > 1 and app.snapshot.errors and shows(app, "3 Errors")():
                await asyncio.sleep(12)
                return app.export_screenshot(title="worker top")
            await asyncio.sleep(0.5)
    raise SystemExit("the workers did not generate in time")


def main() -> None:
    """Run the servers and workers, and write the picture."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE
    with tempfile.TemporaryDirectory() as folder, running_server() as server:
        tiny = make_tiny("llama", Path(folder) / "tiny-llama.gguf")
        each = [
            ("--model", "smollm2", "--name", "node-a", "--queue", "interactive", "--max-running", 4),
            ("--model", "smollm2", "--name", "node-b", "--queue", "batch", "--max-running", 8),
            ("--model", tiny, "--name", "node-c", "--queue", "small", "--max-running", 2),
            ("--echo", "--echo-step-ms", 25, "--name", "node-d", "--queue", "batch", "--max-running", 4),
        ]
        memory = {"WORKER_ENGINE__KV_MEMORY": "3GiB", "WORKER_ENGINE__BACKEND": "cpu"}
        with contextlib.ExitStack() as stack:
            for number, arguments in enumerate(each):
                process = Process(server.url, Path(folder) / str(number), *arguments, **memory)
                stack.callback(process.send, signal.SIGKILL)
                process.await_log("worker_ready", TIMEOUT_S)
            asyncio.run(fill(server.url))
            picture = asyncio.run(take(server.url))
    fonts = re.compile(r"@font-face \{.*?\}", re.DOTALL)  # of another host; the viewer's monospaced font will do
    out.write_text("\n".join(line.rstrip() for line in fonts.sub("", picture).splitlines()) + "\n")


if __name__ == "__main__":
    main()
