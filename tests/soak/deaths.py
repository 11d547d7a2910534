"""Time until another worker continues the job of a killed one, and until an idle worker stops."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

from tests.jobs.stream_checker import violations
from tests.soak.figures import Figure, none_of, percentile
from tests.soak.processes import Program, Programs, await_empty, await_ready, stack
from tests.tiny_models import make_tiny
from worker.jobs.client import Client
from worker.jobs.events import Resumed, Token
from worker.jobs.keys import events_key
from worker.jobs.redis_streams import RedisStreams

JOB = {"prompt": "Once upon a time", "seed": 7, "temperature": 0.8, "ignore_eos": True}
PACE_TOKENS = 8
"""A worker is killed when this many tokens of its job have arrived."""
EXIT_S = 30.0


@dataclass(frozen=True)
class Plan:
    """Numbers of kills and of drains, tokens of a job, and bounds."""

    kills: int
    drains: int
    tokens: int
    noticed_s: float
    drained_s: float


FULL = Plan(kills=10, drains=10, tokens=200, noticed_s=5, drained_s=1)
SHORT = Plan(kills=1, drains=1, tokens=100, noticed_s=15, drained_s=10)


async def run(plan: Plan, folder: Path) -> list[Figure]:
    model = make_tiny("llama", folder / "tiny.gguf")
    noticed: list[float] = []
    async with stack(folder) as (programs, client, _):
        by_pid = {worker.child.process.pid: worker for worker in (_start(programs, model, n) for n in range(2))}
        await await_ready(client, 2)
        undisturbed = [token.id async for token in client.tokens(await client.submit(**JOB, max_tokens=plan.tokens))]
        problems: list[str] = []
        for kill in range(plan.kills):
            after_s, found = await _kill(client, by_pid, f"killed-{kill}", plan.tokens, undisturbed)
            noticed += after_s
            problems += found
            if kill + 1 < plan.kills:
                started = _start(programs, model, kill + 2)
                by_pid[started.child.process.pid] = started
                await _await_running(client, started)
        problems += await _stream_problems(programs.url, plan.kills)
        tiny = [await _drain(programs, client, _start(programs, model, 100 + n)) for n in range(plan.drains)]
        echo = [await _drain(programs, client, programs.echo(f"drained{n}")) for n in range(plan.drains)]
        faults = programs.faults()
    codes = [f"exit code {code}" for _, code in (*tiny, *echo) if code]
    return [
        none_of(f"answers after {plan.kills} kills that differ from the undisturbed one", problems),
        none_of("faults logged", faults),
        Figure("kills that met a job in progress", len(noticed), least=plan.kills),
        Figure("from SIGKILL to `resumed` of another worker, median", percentile(noticed, 50), "s"),
        Figure("the same, the longest", max(noticed), "s", most=plan.noticed_s),
        none_of("idle workers that SIGTERM ended with another exit code than 0", codes),
        Figure(
            "from SIGTERM to the exit of an idle worker, tiny model, the longest",
            _longest(tiny),
            "s",
            most=plan.drained_s,
        ),
        Figure("the same, echo", _longest(echo), "s", most=plan.drained_s),
    ]


def _longest(drains: list[tuple[float, int]]) -> float:
    return max(seconds for seconds, _ in drains)


def _start(programs: Programs, model: Path, number: int) -> Program:
    name = f"tiny{number}"
    options = ("--backend", "cpu", "--model", model, "--context", 1024)
    return programs.start(name, "run", "--name", name, *options)


async def _await_running(client: Client, program: Program) -> None:
    """Wait until this worker is in the registry and takes jobs."""
    pid = str(program.child.process.pid)
    async with asyncio.timeout(60):
        while True:
            for name, status in (await client.workers()).items():
                if name.split("-")[-2] == pid and status["state"] in ("ready", "busy"):
                    return
            assert not program.child.ended, program.log.read_text(errors="replace")
            await asyncio.sleep(0.05)


async def _kill(
    client: Client, by_pid: dict[int, Program], job_id: str, tokens: int, expected: list[int]
) -> tuple[list[float], list[str]]:
    """Kill the worker of a job in its middle; return the time until it is resumed, and problems."""
    received: list[int] = []
    noticed_s: list[float] = []
    killed_s, victim = 0.0, None
    await client.submit(job_id=job_id, **JOB, max_tokens=tokens)
    async for item in client.events(job_id):
        if isinstance(item.event, Token):
            received.append(item.event.id)
            if victim is None and len(received) >= PACE_TOKENS:
                victim = by_pid.pop(int(item.envelope.worker_id.split("-")[-2]))
                victim.child.process.kill()
                killed_s = time.time()
        elif isinstance(item.event, Resumed):
            noticed_s.append(item.envelope.ts_ms / 1000 - killed_s)
    await await_empty(client, EXIT_S)
    return noticed_s, [] if received == expected else [f"{job_id}: its reader received {received}, expected {expected}"]


async def _stream_problems(url: str, kills: int) -> list[str]:
    """Violations of the protocol in the streams of the jobs whose worker was killed."""
    streams, found = RedisStreams.from_url(url), []
    try:
        for job_id in (f"killed-{kill}" for kill in range(kills)):
            found += violations(job_id, await streams.range(events_key(job_id), "-", "+", 10_000))
    finally:
        await streams.close()
    return found


async def _drain(programs: Programs, client: Client, worker: Program) -> tuple[float, int]:
    """Stop an idle worker by SIGTERM; return the time until its process has ended, and its exit code."""
    await _await_running(client, worker)
    began = time.monotonic()
    worker.child.process.terminate()
    code = await asyncio.to_thread(worker.child.process.wait, EXIT_S)
    return time.monotonic() - began, code
