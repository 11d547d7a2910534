"""Many jobs at once in one worker, through a Redis server.

    python -m benchmarks.concurrent_streams [--jobs 64] [--tokens 1000] [--step-ms 5]
    python -m benchmarks.concurrent_streams --model MODEL.gguf [--jobs 64] [--seconds 5]

Server, worker and readers are separate processes on the loopback interface. CPU times are of the
worker's threads, from the kernel's accounting.

Without a model, the echo model runs and no client reads while the worker is measured, so that
readers take no core from it. It prints the CPU time of the event loop's thread and of the engine's
thread for each token.

With a model, it measures one after the other:

- the engine alone in a process of its own, with as many sequences (`engine_rate`);
- the same load through the server: tokens/s as readers receive them, CPU time, and the time between
  two tokens of a stream, by the engine's clock and as readers see it;
- the time between two tokens while prompts of 2,000 tokens arrive, four at a time;
- the time from a job's submission to its first token beside 32 running streams.

Tokens of a stream are published every `flush_ms`, so a reader receives several at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import psutil
from redis.asyncio import Redis

from benchmarks.engine_rate import EngineRate
from benchmarks.stream_load import Load, LoadProcesses, StreamTimes, text_ids
from worker.embedded import Child, embedded_server
from worker.jobs.client import Client
from worker.jobs.keys import state_key

READY_S = 180.0
"""A first start compiles the kernels."""
LIMIT_S = 120.0
PROMPT = "0123456789" * 3
LONG_PROMPTS = 4
PROBES_BESIDE = 32
PROBE_PAUSE_S = 0.03

Steps: TypeAlias = Sequence[tuple[float, Sequence[tuple[float, int]]]]
"""What `recorded_worker` writes."""


def thread_s(process: psutil.Process) -> dict[str, float]:
    """CPU seconds of the event loop's thread, of all others and of both."""
    times = {thread.id: thread.user_time + thread.system_time for thread in process.threads()}
    loop = times[process.pid]
    return {"event loop": loop, "engine": sum(times.values()) - loop, "worker": sum(times.values())}


def cpu_report(before: Mapping[str, float], after: Mapping[str, float], tokens: float) -> str:
    """CPU time a token, as text."""
    return ", ".join(f"{name} {1e6 * (after[name] - before[name]) / tokens:.1f} µs" for name in before)


async def wait_for_worker(client: Client, worker: Child) -> None:
    """Wait until the worker is ready. Raises SystemExit if it has ended."""
    async with asyncio.timeout(READY_S):
        while not any(status.get("state") == "ready" for status in (await client.workers()).values()):
            if worker.ended:
                raise SystemExit("the worker has ended; see its log above")
            await asyncio.sleep(0.05)


async def run_echo_jobs(client: Client, redis: Redis, jobs: int, tokens: int) -> None:
    """Submit the jobs and wait for their ends, without a read of their events."""
    names = [f"{tokens}-{number}" for number in range(jobs)]
    for name in names:
        await client.submit(job_id=name, prompt=PROMPT, max_tokens=tokens)
    async with asyncio.timeout(LIMIT_S):
        for name in names:
            while await redis.hget(state_key(name), "state") != b"end":
                await asyncio.sleep(0.1)


async def measure_echo(url: str, worker: Child, jobs: int, tokens: int) -> None:
    """Print one line: rates, and microseconds of CPU time for each token."""
    process = psutil.Process(worker.process.pid)
    async with Client.from_url(url) as client, Redis.from_url(url, protocol=2) as redis:
        await wait_for_worker(client, worker)
        await run_echo_jobs(client, redis, jobs, 20)  # warm-up
        before, began = thread_s(process), time.perf_counter()
        await run_echo_jobs(client, redis, jobs, tokens)
        seconds, after = time.perf_counter() - began, thread_s(process)
    count = jobs * tokens
    rate = f"{jobs} jobs of {tokens} tokens: {count / seconds:,.0f} tokens/s"
    print(f"{rate}; CPU time a token: {cpu_report(before, after, count)}")


@dataclass(frozen=True)
class Spread:
    """Percentiles of durations, each with a weight."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, durations: Iterable[tuple[float, int]]) -> Spread:
        """From pairs of seconds and weight; NaN without any."""
        ordered = sorted(durations)
        total, reached, ends = sum(weight for _, weight in ordered), 0, list[int]()
        for _, weight in ordered:
            reached += weight
            ends.append(reached)

        def at(share: float) -> float:
            return ordered[bisect_left(ends, share * total)][0] if total else math.nan

        return cls(at(0.50), at(0.95), at(0.99))

    def __str__(self) -> str:
        return f"p50 {1000 * self.p50:.2f}, p95 {1000 * self.p95:.2f}, p99 {1000 * self.p99:.2f} ms"


@dataclass(frozen=True)
class Window:
    """The measured part of a phase, in `time.monotonic` seconds."""

    begin: float
    end: float

    def gaps(self, times: Iterable[tuple[float, int]]) -> list[tuple[float, int]]:
        """Seconds between neighbours, weighted by the tokens of the later one."""
        inside = [(at, count) for at, count in times if self.begin <= at <= self.end and count]
        return [(later - earlier, count) for (earlier, _), (later, count) in pairwise(inside)]

    def engine_gaps(self, steps: Steps) -> Spread:
        """Time between two tokens of a stream, by the ends of the engine's steps."""
        return Spread.of(gap for at, gaps in steps if at <= self.end for gap in gaps if self.begin <= at - gap[0])

    def tokens(self, jobs: Iterable[StreamTimes]) -> int:
        """Tokens that readers received."""
        return sum(count for job in jobs for at, count in job.arrivals if self.begin <= at < self.end)

    def between_reads(self, jobs: Iterable[StreamTimes]) -> Spread:
        """Time between two reads of a stream."""
        return Spread.of((gap, 1) for job in jobs for gap, _ in self.gaps(job.arrivals))


@dataclass(frozen=True)
class Phase:
    """What one phase has measured, but for the engine's steps, which are read later."""

    window: Window
    jobs: Sequence[StreamTimes]
    cpu: str = ""


class Measurement:
    """The phases with one worker."""

    def __init__(self, processes: LoadProcesses, worker: Child, ids: range, options: argparse.Namespace) -> None:
        self._processes = processes
        self._process = psutil.Process(worker.process.pid)
        self._ids = ids
        self._options = options

    async def throughput(self) -> Phase:
        """Jobs as `engine_rate` has them, and some more that wait."""
        slots = self._options.jobs + max(1, self._options.jobs // 16)
        return await self._run(self._load("many", slots, self._options.prompt, tuple(self._options.tokens)))

    async def long_prompts(self) -> Phase:
        """Streams beside prompts that keep arriving; the jobs are those of the streams."""
        streams = self._streams("streams", max(1, self._options.jobs - LONG_PROMPTS))
        return await self._run(streams, self._load("long", LONG_PROMPTS, self._options.long_prompt, (8, 8)))

    async def first_tokens(self) -> Phase:
        """Short jobs beside running streams; the jobs are the short ones."""
        probe = replace(self._load("probe", 1, self._options.prompt, (2, 2)), pause_s=PROBE_PAUSE_S)
        return await self._run(probe, self._streams("beside", min(PROBES_BESIDE, self._options.jobs - 1)))

    def _streams(self, name: str, slots: int) -> Load:
        """Jobs as long as the context allows."""
        longest = int(self._options.context - self._options.prompt - 1)
        return self._load(name, slots, self._options.prompt, (longest, longest))

    def _load(self, name: str, slots: int, prompt: int, tokens: tuple[int, int]) -> Load:
        return Load(name, slots, prompt, self._ids, tokens, until=0.0)

    async def _run(self, *loads: Load) -> Phase:
        """Run loads for the warm-up and the measured time; the phase has the jobs of the first."""
        begin = time.monotonic() + self._options.warm_up
        window = Window(begin, begin + self._options.seconds)
        running = asyncio.create_task(self._processes.run(*(replace(load, until=window.end) for load in loads)))
        await asyncio.sleep(window.begin - time.monotonic())
        before = thread_s(self._process)
        await asyncio.sleep(window.end - time.monotonic())
        after = thread_s(self._process)
        jobs = await running
        return Phase(window, jobs[0], cpu_report(before, after, max(1, window.tokens(jobs[0]))))


def print_phases(alone: EngineRate, phases: Mapping[str, Phase], steps: Steps, options: argparse.Namespace) -> None:
    """Print the figures of a model."""

    def line(name: str, text: str) -> None:
        print(f"  {name:42} {text}")

    many, long, probes = phases["throughput"], phases["long_prompts"], phases["first_tokens"]
    rate = many.window.tokens(many.jobs) / (many.window.end - many.window.begin)
    print(f"{options.model.name}: {options.jobs} jobs at once, prompts of {options.prompt}, answers of", end=" ")
    print("{} to {} tokens".format(*options.tokens))
    line("engine alone", f"{alone.tokens_per_s:,.0f} tokens/s, step {alone.step_ms:.2f} ms")
    line("through Redis", f"{rate:,.0f} tokens/s, {rate / alone.tokens_per_s:.1%} of the engine alone")
    line("CPU time a token", many.cpu)
    line("between two tokens, engine", str(many.window.engine_gaps(steps)))
    line("between two reads of a stream", str(many.window.between_reads(many.jobs)))
    spread = long.window.engine_gaps(steps)
    times = 1000 * spread.p99 / alone.step_ms
    line(f"beside prompts of {options.long_prompt}: engine", f"{spread}; p99 is {times:.1f} steps")
    line("… reads of a stream", str(long.window.between_reads(long.jobs)))
    first = [
        job.arrivals[0][0] - job.submitted
        for job in probes.jobs
        if job.arrivals and probes.window.begin <= job.submitted and job.arrivals[0][0] <= probes.window.end
    ]
    beside = f"first token beside {min(PROBES_BESIDE, options.jobs - 1)} streams"
    line(beside, f"{Spread.of((each, 1) for each in first)}; {len(first)} jobs")


def engine_alone(options: argparse.Namespace) -> EngineRate:
    """Run `engine_rate` in its own process, which frees the device."""
    command = [sys.executable, "-m", "benchmarks.engine_rate", options.model, "--streams", options.jobs]
    command += ["--prompt", options.prompt, "--tokens", *options.tokens, "--context", options.context]
    command += ["--warm-up", options.warm_up, "--seconds", options.seconds]
    with tempfile.TemporaryFile() as output:
        child = Child([str(part) for part in command], output)
        deadline = time.monotonic() + READY_S + options.warm_up + options.seconds
        while not child.ended and time.monotonic() < deadline:
            time.sleep(0.05)
        status = child.stop()
        output.seek(0)
        text = output.read().decode(errors="replace").strip()
    if status:
        raise SystemExit(f"benchmarks.engine_rate failed:\n{text}")
    rate = EngineRate(**json.loads(text.splitlines()[-1]))
    if not rate.tokens_per_s:
        raise SystemExit(f"the engine drew no token in {options.seconds} s; pass a longer --seconds")
    return rate


async def measure_model(url: str, worker: Child, ids: range, options: argparse.Namespace) -> dict[str, Phase]:
    """Run all phases with a worker that is starting."""
    async with Client.from_url(url) as client:
        await wait_for_worker(client, worker)
    with LoadProcesses(url, options.readers) as processes:
        measurement = Measurement(processes, worker, ids, options)
        return {
            "throughput": await measurement.throughput(),
            "long_prompts": await measurement.long_prompts(),
            "first_tokens": await measurement.first_tokens(),
        }


def run_with_worker(
    command: Sequence[str | Path], options: Sequence[str], measure: Callable[[str, Child], None]
) -> None:
    """Start a server and a worker, and call `measure`; a worker's log of errors is printed."""
    with embedded_server() as url, tempfile.TemporaryFile() as log:
        options = ["--redis-url", url, "--http-port", "0", "--log-level", "error", "--grace", "0", *options]
        worker = Child([sys.executable, "-m", *command, *options], log)
        try:
            measure(url, worker)
        finally:
            worker.stop()
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace"))


def run_echo(options: argparse.Namespace) -> None:
    """Measure the echo model."""
    arguments = ["--echo", "--max-running", str(options.jobs), "--echo-step-ms", str(options.step_ms)]
    run_with_worker(
        ["worker", "run"],
        arguments,
        lambda url, worker: asyncio.run(measure_echo(url, worker, options.jobs, options.tokens[-1])),
    )


def run_model(options: argparse.Namespace) -> None:
    """Measure a model file."""
    alone = engine_alone(options)
    ids = text_ids(alone.vocab_size)
    phases: dict[str, Phase] = {}
    with tempfile.TemporaryDirectory() as folder:
        steps = Path(folder) / "steps.json"
        arguments = ["--model", str(options.model), "--context", str(options.context)]
        arguments += ["--max-running", str(options.jobs)]
        run_with_worker(
            ["benchmarks.recorded_worker", steps, str(options.switch_ms)],
            arguments,
            lambda url, worker: phases.update(asyncio.run(measure_model(url, worker, ids, options))),
        )
        print_phases(alone, phases, json.loads(steps.read_text()), options)


def main() -> None:
    """Parse the arguments, start server and worker, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file; without it, the echo model")
    parser.add_argument("--jobs", type=int, default=64)
    parser.add_argument(
        "--tokens", type=int, nargs="+", help="of an answer: default 1000 with echo, with a model 256 768 (uniform)"
    )
    parser.add_argument("--step-ms", type=float, default=5.0, help="of the echo model")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--long-prompt", type=int, default=2000, help="tokens of the prompts that keep arriving")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--switch-ms", type=float, default=0.0, help="the worker's GIL switch interval; 0: its own")
    parser.add_argument("--warm-up", type=float, default=2.0, help="seconds of each phase before it is measured")
    parser.add_argument("--seconds", type=float, default=5.0, help="measured seconds of each phase")
    parser.add_argument("--readers", type=int, default=max(1, min(8, (os.cpu_count() or 1) - 4)))
    options = parser.parse_args()
    if options.model is None:
        options.tokens = options.tokens or [1000]
        run_echo(options)
    else:
        options.tokens = (options.tokens or [256, 768]) * 2
        options.tokens = [min(options.tokens), max(options.tokens)]
        run_model(options)


if __name__ == "__main__":
    main()
