"""Load of one gateway process: many streams at once, relayed tokens, added first-token latency.

    python -m benchmarks.gateway [--streams 1000] [--seconds 10] [--rate 25] [--slow 1]

Redis server, gateway, the writer of events and the HTTP clients are four processes on loopback. The
writer stands for the workers: it takes the jobs and appends `rate` tokens a second to each, one
token an entry, whose text is the time of writing. `slow` further clients read nothing: they must
delay no other. The first-token latency is that from the entry's writing to its arrival at the
client, one request at a time; the same for a reader of `worker.Client` is what it is compared with.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles

import psutil
from redis.asyncio import Redis

from worker.embedded import Child, embedded_server, free_port
from worker.jobs.client import Client
from worker.jobs.events import End, Envelope, Event, Started, Token, Tokens, encode_event
from worker.jobs.keys import events_key, queue_key
from worker.jobs.payload import job_id_of
from worker.jobs.redis_streams import RedisStreams
from worker.jobs.transport import Transport

MODEL = "written"
SINGLE_REQUESTS = 200
_READY_S = 30.0
_START_S = 60.0


def _command(job_id: str, event: Event, seq: int) -> tuple[object, ...]:
    """The XADD of a job's event."""
    encoded = encode_event(event, Envelope(job_id, 1, int(time.time() * 1000), "writer", "c", "t"))
    return "XADD", events_key(job_id), f"1-{seq}", "type", encoded.kind, "p", encoded.packed


def _tokens(index: int) -> Tokens:
    """One token whose text is the time."""
    return Tokens(tokens=(Token(index, 5, f"{time.time():.6f} "),))


@dataclass
class Writer:
    """Takes jobs from the queue and writes their events."""

    streams: RedisStreams
    raw: Redis
    jobs: list[str] = field(default_factory=list)
    position: str = "0-0"

    async def take(self) -> None:
        """Take new jobs, and publish that they start."""
        records = await self.streams.read(queue_key("default"), self.position, 20)
        new = [job_id_of(fields["p"]) or "" for _, fields in records]
        self.position = records[-1][0] if records else self.position
        started = Started(
            model=MODEL,
            seed=1,
            max_tokens=9999,
            prompt_tokens=1,
            cached_tokens=0,
            started_at=0,
            enqueued_at=0,
            prompt_hash="",
            fingerprint="written",
        )
        await self.send([_command(job, started, 0) for job in new])
        self.jobs += new

    async def send(self, commands: Sequence[tuple[object, ...]]) -> None:
        """Execute commands in one round trip."""
        if commands:
            pipeline = self.raw.pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command)
            await pipeline.execute()

    async def end(self, tokens: int) -> None:
        """End all jobs."""
        end = End(finish_reason="stop", tokens_out=tokens, prompt_tokens=1, ttft_ms=1.0, decode_ms=1.0)
        await self.send([_command(job, end, tokens + 1) for job in self.jobs])
        self.jobs = []


async def _write(url: str, count: int, seconds: float, rate: float, requests: int) -> None:
    streams = RedisStreams.from_url(url)
    transport = Transport(streams, "writer")
    await transport.open()
    status = {"model": MODEL, "state": "ready", "queue": "default", "started_ms": "0"}

    async def heartbeat() -> None:
        while True:
            await transport.registration.heartbeat(status)
            await asyncio.sleep(4)

    beating = asyncio.create_task(heartbeat())
    writer = Writer(streams, Redis.from_url(url, protocol=2))
    for _ in range(2 * requests):
        while not writer.jobs:
            await writer.take()
        await asyncio.sleep(0.01)
        await writer.send([_command(job, _tokens(0), 1) for job in writer.jobs])
        await writer.end(1)
    while len(writer.jobs) < count:
        await writer.take()
    began, tokens = time.monotonic(), int(seconds * rate)
    for index in range(tokens):
        await asyncio.sleep(max(0.0, began + index / rate - time.monotonic()))
        await writer.send([_command(job, _tokens(index), index + 1) for job in writer.jobs])
    await writer.end(tokens)
    beating.cancel()


def write(url: str, streams: int, seconds: float, rate: float, requests: int) -> None:
    """The writer's process."""
    asyncio.run(_write(url, streams, seconds, rate, requests))


@dataclass
class Stream(asyncio.Protocol):
    """One HTTP request; with `slow` its response is not read."""

    request: bytes
    slow: bool = False
    tokens: int = 0
    written_s: list[float] = field(default_factory=list)
    delays_ms: list[float] = field(default_factory=list)
    first_s: float = 0.0
    last_s: float = 0.0
    _buffer: bytes = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        assert isinstance(transport, asyncio.Transport), "TCP"
        self.transport = transport
        transport.write(self.request)
        if self.slow:
            transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        """Note the delay of each chunk, from the text of its last token."""
        now, head, buffer = time.time(), b'"content":"', self._buffer + data
        blocks = buffer.split(b"\n\n")
        self._buffer = blocks.pop()
        for block in blocks:
            _, found, rest = block.partition(head)
            text = rest.partition(b'"')[0].split() if found else []
            if text:
                self.tokens += len(text)
                written_s = [float(each) for each in text]
                self.written_s += written_s
                self.delays_ms += [(now - each) * 1000 for each in written_s]
                self.last_s = now
                self.first_s = self.first_s or now
        if b"[DONE]" in data and not self.done.done():
            self.done.set_result(None)
            self.transport.close()

    def has_all(self, tokens: int) -> bool:
        """Whether each token arrived once, in the order of writing."""
        return len(self.written_s) == tokens and all(map(float.__lt__, self.written_s, self.written_s[1:]))

    def connection_lost(self, exc: Exception | None) -> None:
        """End a stream that broke."""
        if not self.done.done():
            self.done.set_exception(exc or ConnectionError("closed before the end"))


def _request(port: int) -> bytes:
    messages = [{"role": "user", "content": "x"}]
    body = json.dumps({"model": MODEL, "messages": messages, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return head.encode() + f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


async def _open(port: int, *, slow: bool = False) -> Stream:
    loop = asyncio.get_running_loop()
    _, stream = await loop.create_connection(lambda: Stream(_request(port), slow), "127.0.0.1", port)
    return stream


async def _first_tokens(url: str, port: int, requests: int) -> tuple[list[float], list[float]]:
    """Delays of first tokens, ms: through the gateway, and of a direct reader."""
    through, direct = [], []
    async with Client.from_url(url) as client:
        for _ in range(requests):
            stream = await _open(port)
            await stream.done
            through += stream.delays_ms[:1]
            tokens = client.tokens(await client.submit(prompt="x", model=MODEL))
            direct += [(time.time() - float(token.t)) * 1000 async for token in tokens]
    return through, direct


async def _await_model(url: str, port: int) -> None:
    async with Client.from_url(url) as client, asyncio.timeout(_READY_S):
        while not await client.workers():
            await asyncio.sleep(0.05)
        while True:
            try:
                _, probe = await asyncio.open_connection("127.0.0.1", port)
                probe.close()
                await probe.wait_closed()
                break
            except OSError:
                await asyncio.sleep(0.05)
        await asyncio.sleep(1.5)  # the gateway reads the registry every second


async def measure(
    url: str, port: int, gateway: psutil.Process, streams: int, slow: int, requests: int, expected: int
) -> dict[str, float]:
    """Print and return the figures; each stream has `expected` tokens."""
    await _await_model(url, port)
    through, direct = await _first_tokens(url, port, requests)
    print(f"first token, gateway   {_spread(through)}")
    print(f"first token, direct    {_spread(direct)}")
    cpu, began = gateway.cpu_times(), time.perf_counter()
    opened = [await _open(port, slow=n < slow) for n in range(streams + slow)]
    async with asyncio.timeout(_START_S):
        await asyncio.gather(*(stream.done for stream in opened[slow:]))
    seconds, now = time.perf_counter() - began, gateway.cpu_times()
    read = opened[slow:]
    window = max(stream.last_s for stream in read) - min(stream.first_s for stream in read)
    tokens = sum(stream.tokens for stream in read)
    delays = [delay for stream in read for delay in stream.delays_ms]
    async with Redis.from_url(url, protocol=2) as raw:
        clients = [each for each in await raw.client_list() if each["cmd"] != "client|list"]
    share = (now.user + now.system - cpu.user - cpu.system) / seconds
    print(f"{streams} streams         {tokens:,} tokens in {window:.1f} s: {tokens / window:,.0f} tokens/s")
    print(f"                       {_spread(delays)}; {share:.0%} of a core, {len(clients)} connections to Redis")
    for stream in opened[:slow]:
        stream.done.exception() if stream.done.done() else stream.done.cancel()
        stream.transport.abort()
    added = quantiles(through, n=20)[-1] - quantiles(direct, n=20)[-1]
    return {
        "tokens": tokens,
        "tokens_per_s": tokens / window,
        "added_p95_ms": added,
        "connections": len(clients),
        "uneven": sum(not stream.has_all(expected) for stream in read),
        "p99_ms": quantiles(delays, n=100)[-1],
    }


def _spread(delays_ms: list[float]) -> str:
    p95 = quantiles(delays_ms, n=20)[-1]
    return f"median {median(delays_ms):.2f} ms, 95 % within {p95:.2f} ms, maximum {max(delays_ms):.1f} ms"


async def run(
    streams: int, seconds: float, rate: float, slow: int, requests: int = SINGLE_REQUESTS
) -> dict[str, float]:
    """Start server, gateway and writer; measure."""
    with embedded_server() as url, tempfile.TemporaryFile() as log:
        port = free_port()
        options = ["--redis-url", url, "--port", str(port), "--log-level", "error"]
        gateway = Child([sys.executable, "-m", "worker", "gateway", *options], log)
        context = multiprocessing.get_context("spawn")
        writer = context.Process(target=write, args=(url, streams + slow, seconds, rate, requests), daemon=True)
        writer.start()
        try:
            process = psutil.Process(gateway.process.pid)
            return await measure(url, port, process, streams, slow, requests, int(seconds * rate))
        finally:
            writer.kill()
            writer.join()
            gateway.stop()


def main() -> None:
    """Parse the options and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=25.0, help="tokens a second of each stream")
    parser.add_argument("--slow", type=int, default=1, help="further clients that read nothing")
    options = parser.parse_args()
    asyncio.run(run(options.streams, options.seconds, options.rate, options.slow))


if __name__ == "__main__":
    main()
