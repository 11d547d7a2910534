"""Many streams at one gateway: few connections to the server, and a reader that stalls nobody."""

from __future__ import annotations

import asyncio
import contextlib
import json

from benchmarks.gateway import run
from tests.gateway.gateways import fake_worker, gateway, wait_for_jobs
from tests.jobs.echo import take_next
from worker.jobs.events import Token, Tokens

STREAMS = 60
TOKENS, SIZE = 200, 100_000
"""More than the buffers of a connection hold."""


async def test_the_load_benchmark_relays_every_token_of_every_stream():
    figures = await run(STREAMS, seconds=1.0, rate=10.0, slow=1, requests=5)
    assert figures["tokens"] == STREAMS * 10
    assert figures["uneven"] == 0
    assert figures["connections"] < STREAMS
    assert figures["tokens_per_s"] > 0


async def test_a_client_that_does_not_read_delays_no_other_and_keeps_no_events_in_memory(harness):
    async with gateway(harness) as running, contextlib.AsyncExitStack() as opened:
        transport = await fake_worker(harness, running)
        body = json.dumps({"model": "echo", "messages": [{"role": "user", "content": "x"}], "stream": True}).encode()
        request = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        )
        readers = []
        for count in (1, 2):  # the first one does not read
            reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
            opened.push_async_callback(writer.wait_closed)
            opened.callback(writer.transport.abort)
            writer.write(request)
            readers.append(reader)
            await wait_for_jobs(running, count)
        leases = [await take_next(transport) for _ in readers]
        reading = asyncio.create_task(read_until(readers[1], TOKENS * SIZE))
        for index in range(TOKENS):
            for lease in leases:
                await transport.append(lease, Tokens(tokens=(Token(index, 5, "x" * SIZE),)))
        await asyncio.wait_for(reading, 20)
        of_slow = running.metric("gateway_tokens_total") - TOKENS
        assert of_slow < TOKENS, "the gateway has read on for the slow client"


async def read_until(reader, size):
    while size > 0:
        size -= len(await reader.read(2**20))
