"""The Redis server goes away in mid-stream: the client sees a pause."""

from __future__ import annotations

import asyncio

import pytest

from tests.gateway.gateways import chunks_of, fake_worker, gateway, wait_for_jobs
from tests.jobs.echo import end, take_next, text, tokens
from tests.jobs.harness import ServerHarness, wait_until
from tests.jobs.servers import running_server
from worker.jobs.streams import Disconnected

BODY = {"model": "echo", "messages": [{"role": "user", "content": "hello"}], "stream": True}


async def test_a_stream_goes_on_when_the_server_is_back():
    with running_server(persistent=True) as server:
        harness = ServerHarness(server.url)
        async with gateway(harness) as running:
            transport = await fake_worker(harness, running)
            received = asyncio.create_task(running.http().post("/v1/chat/completions", json=BODY))
            await wait_for_jobs(running, 1)
            lease = await take_next(transport)
            await transport.append(lease, tokens(0, 3))

            async def relayed():
                return running.metric("gateway_tokens_total") == 3

            await wait_until(relayed)
            server.stop()
            with pytest.raises(Disconnected):
                await running.client.queue_length()
            server.start()
            await transport.append(lease, tokens(3, 6))
            await transport.finish(lease, end(6))
            deltas = [chunk["choices"][0]["delta"] for chunk in chunks_of((await received).text)]
            assert "".join(delta.get("content", "") for delta in deltas) == text(6)
        await harness.close()
