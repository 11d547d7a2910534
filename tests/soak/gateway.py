"""The HTTP gateway: 1,000 streams at once, and its size over many requests."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import httpx

from benchmarks.gateway import run as run_streams
from tests.soak.figures import Figure, none_of
from tests.soak.jobs import EchoJob
from tests.soak.processes import Census, Growth, Program, await_empty, await_ready, stack
from worker.embedded import free_port
from worker.jobs.client import Client

SETTINGS = "[lease]\nretention_s = 10\n"
MAX_RUNNING = 64
READY_S = 60.0
QUIET_S = 2.0
TOKENS, LEFT_TOKENS = 24, 4000
CYCLE = 20
"""Requests after which the kinds repeat."""
KINDS = {3: "left", 8: "refused", 13: "whole", 18: "whole"}
"""Kinds of requests by their number modulo CYCLE; the rest are streamed to their end."""


@dataclass(frozen=True)
class Plan:
    """Streams at once and their tokens, requests before each census, and bounds."""

    streams: int
    """0 leaves them out: `tests/gateway/test_load.py` has a short form."""
    seconds: float
    rate: float
    first: int
    last: int
    parallel: int
    redis_connections: int
    growth: Growth


FULL = Plan(1000, 20, 5, 4000, 20_000, 32, redis_connections=80, growth=Growth(rss_mb=4, objects=1000, connections=32))
SHORT = Plan(0, 0, 0, 150, 300, 16, redis_connections=80, growth=Growth(rss_mb=16, objects=5000, connections=40))


async def run(plan: Plan, folder: Path) -> list[Figure]:
    streams = await _streams(plan) if plan.streams else []
    return streams + await _requests(plan, folder)


async def _streams(plan: Plan) -> list[Figure]:
    """The benchmark of concurrent streams, with one client that does not read."""
    with contextlib.redirect_stdout(io.StringIO()):
        figures = await run_streams(plan.streams, plan.seconds, plan.rate, slow=1, requests=5)
    name = f"{plan.streams:,} streams at once"
    return [
        Figure(f"{name}: tokens received", figures["tokens"], least=plan.streams * int(plan.seconds * plan.rate)),
        Figure(f"{name}: with a token lost, repeated or out of order", figures["uneven"], most=0),
        Figure(f"{name}: connections to Redis", figures["connections"], most=plan.redis_connections),
        Figure(f"{name}: from writing to arrival, p99", figures["p99_ms"], "ms"),
    ]


async def _requests(plan: Plan, folder: Path) -> list[Figure]:
    problems: list[str] = []
    async with stack(folder, SETTINGS) as (programs, client, _):
        programs.echo("gateway-worker", MAX_RUNNING, step_ms=0)
        port = free_port()
        gateway = programs.start("gateway", "gateway", "--port", port)
        await await_ready(client, 1)
        limits = httpx.Limits(max_connections=plan.parallel, max_keepalive_connections=plan.parallel)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=60) as http:
            await _await_model(http)
            numbers, began = count(), time.monotonic()
            await _send(http, numbers, plan.first, plan.parallel, problems)
            first = await _at_rest(client, gateway)
            await _send(http, numbers, plan.last - plan.first, plan.parallel, problems)
            last = await _at_rest(client, gateway)
            seconds = time.monotonic() - began
        faults = programs.faults()
    return [
        none_of(f"of {plan.last:,} requests, those with a wrong answer", problems),
        none_of("faults logged", faults),
        Figure("requests/s", plan.last / seconds),
        *plan.growth.figures(f"requests {plan.first:,} to {plan.last:,}", first, last),
    ]


async def _await_model(http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(READY_S):
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await http.get("/v1/models")).json()["data"]:
                    return
            await asyncio.sleep(0.1)


async def _send(
    http: httpx.AsyncClient, numbers: Iterator[int], requests: int, parallel: int, problems: list[str]
) -> None:
    """Send the next requests, `parallel` at once."""
    left = iter(range(requests))

    async def send_some() -> None:
        for _ in left:
            number = next(numbers)
            problems.extend(await _request(http, number, KINDS.get(number % CYCLE, "streamed")))

    async with asyncio.TaskGroup() as group:
        for _ in range(parallel):
            group.create_task(send_some())


async def _request(http: httpx.AsyncClient, number: int, kind: str) -> list[str]:
    """Send one request; return what is wrong with its answer."""
    job = EchoJob(f"request-{number}", LEFT_TOKENS if kind == "left" else TOKENS)
    body = {"model": "echo", "prompt": job.prompt, "max_tokens": job.tokens, "stream": kind in ("left", "streamed")}
    if kind == "refused":
        body["temperature"] = 9
    if not body["stream"]:
        response = await http.post("/v1/completions", json=body)
        if kind == "refused":
            return [] if response.status_code == 400 else [f"{job.job_id}: status {response.status_code}"]
        text = response.json()["choices"][0]["text"]
        return [] if text == job.answer else [f"{job.job_id}: {text!r}, expected {job.answer!r}"]
    parts: list[str] = []
    async with http.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                parts.append(json.loads(line[6:])["choices"][0]["text"])
                if kind == "left":
                    break
    text, expected = "".join(parts), job.answer
    right = text == expected or (kind == "left" and expected.startswith(text))
    return [] if right else [f"{job.job_id}: {text!r}, expected {expected!r}"]


async def _at_rest(client: Client, gateway: Program) -> Census:
    """What the gateway holds when nothing runs."""
    await await_empty(client, READY_S)
    await asyncio.sleep(QUIET_S)
    return await gateway.census()
