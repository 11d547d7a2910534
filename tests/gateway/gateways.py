"""Gateways on loopback ports, in the test's event loop or as processes, and their clients."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai

from tests.jobs.harness import Harness, wait_until
from tests.service.processes import Process
from worker.config import GatewaySection, LogSection
from worker.gateway.context import GatewayContext
from worker.gateway.keys import ApiKeys, Caller
from worker.gateway.server import GatewayServer, listen
from worker.jobs.client import Client
from worker.jobs.transport import Transport
from worker.telemetry import open_log


@dataclass
class Gateway:
    """A gateway that listens."""

    context: GatewayContext
    server: GatewayServer
    port: int
    output: io.StringIO
    _opened: list[Any] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def client(self) -> Client:
        return self.context.client

    def openai(self, **options: Any) -> openai.AsyncOpenAI:
        """OpenAI's client, without retries by default."""
        return self._close_later(openai_client(self.url, **options))

    def anthropic(self, **options: Any) -> anthropic.AsyncAnthropic:
        """Anthropic's client, without retries by default."""
        defaults = {"api_key": "none", "max_retries": 0, "timeout": 60}
        return self._close_later(anthropic.AsyncAnthropic(base_url=self.url, **{**defaults, **options}))

    def http(self, **options: Any) -> httpx.AsyncClient:
        return self._close_later(httpx.AsyncClient(base_url=self.url, timeout=30, **options))

    def _close_later(self, client: Any) -> Any:
        self._opened.append(client)
        return client

    async def close_clients(self) -> None:
        for client in self._opened:
            await (client.aclose() if isinstance(client, httpx.AsyncClient) else client.close())

    async def wait_for_model(self, name: str) -> None:
        """Wait until the registry has a worker of the model that takes jobs."""

        async def listed() -> bool:
            await self.context.models.refresh()
            return name in [model.name for model in self.context.models.served(Caller())]

        await wait_until(listed, 10)

    def logged(self, event: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.output.getvalue().splitlines()]
        return [line for line in lines if line["event"] == event]

    def metric(self, sample: str) -> float:
        """The value of a sample, named as in the exposition, with its labels."""
        lines = self.context.metrics.exposition().decode().splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{sample} ")), 0.0)


def openai_client(url: str, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 60, **options})


@contextlib.asynccontextmanager
async def gateway(
    harness: Harness,
    *,
    keys: ApiKeys | None = None,
    client: Client | None = None,
    bound: int = 10_000,
    tracing: Any = None,
    **section: Any,
) -> AsyncIterator[Gateway]:
    """A gateway over `harness`, which has read the registry once."""
    settings = GatewaySection(**{"port": 0, "registry_s": 0.05, "grace_s": 5.0, **section})
    output = io.StringIO()
    log = open_log(LogSection(format="json"), "gateway", output)
    context = GatewayContext(settings, client or harness.client(bound=bound), keys or ApiKeys(), log, tracing=tracing)
    listener = listen(settings)
    server = GatewayServer(context)
    task = asyncio.create_task(server.serve([listener]))
    running = Gateway(context, server, listener.getsockname()[1], output)

    async def started() -> bool:
        if task.done():
            task.result()
        return server.started

    try:
        await wait_until(started)
        await context.models.refresh()
        yield running
    finally:
        await running.close_clients()
        server.drain()
        await asyncio.wait_for(task, 15)


async def fake_worker(harness: Harness, running: Gateway, model: str = "echo", queue: str = "default") -> Transport:
    """A registered worker of a model, whose jobs the test itself answers."""
    transport = await harness.transport(f"of-{model}")
    status = {"model": model, "state": "ready", "queue": queue, "started_ms": "0", "context": "4096"}
    await transport.registration.heartbeat(status)
    await running.wait_for_model(model)
    return transport


async def wait_for_jobs(running: Gateway, count: int) -> None:
    """Wait until the queue has `count` jobs."""

    async def queued() -> bool:
        return await running.client.queue_length() == count

    await wait_until(queued, 10)


class GatewayProcess(Process):
    """`worker gateway`; `url` is where it listens, once it has started."""

    def __init__(self, redis_url: str, log: Path, *arguments: object, **environment: str) -> None:
        super().__init__(redis_url, log, *arguments, **{"WORKER_GATEWAY__REGISTRY_S": "0.05", **environment})

    command = "gateway"
    port_option = "--port"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.await_log('listening')['port']}"


def events_of(body: bytes | str) -> list[dict[str, str]]:
    """The server-sent events of a whole stream, comments left out: their fields by name."""
    text = body.decode() if isinstance(body, bytes) else body
    found = []
    for block in text.split("\n\n"):
        lines = [line.partition(": ") for line in block.splitlines() if not line.startswith(":")]
        if lines:
            found.append({name: value for name, _, value in lines})
    return found


def chunks_of(body: bytes | str) -> list[dict[str, Any]]:
    """The chunks of a stream that ended as it should."""
    events = events_of(body)
    assert events[-1] == {"data": "[DONE]"}
    return [json.loads(event["data"]) for event in events[:-1]]
