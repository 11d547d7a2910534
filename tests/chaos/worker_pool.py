"""The workers of a run: `worker run` processes, restarted when they end, and their faults."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import IO

from tests.chaos.clock import Clock
from tests.chaos.network import Network
from tests.chaos.plan import Plan
from tests.chaos.workload import ECHO_CONTEXT, PREFILL_CHUNK, QUEUES, TINY_CONTEXT
from worker.embedded import Child
from worker.jobs.streams import Streams, retry_until_connected

LEASE_S = 2.0
SETTINGS = f"""
[lease]
lease_s = {LEASE_S}
renew_s = {LEASE_S / 4}
scan_s = {LEASE_S / 8}

[service]
grace_s = 0.25

[engine]
backend = "cpu"
prefill_chunk = {PREFILL_CHUNK}

[http]
port = 0

[log]
format = "json"
"""
ECHO_STEP_MS = 1.5
STOP_S = 60.0
STEPS_S = (-3600, 3600)
POLL_S = 5.0
"""Time for which to look for a worker that has a job."""


@dataclass
class Slot:
    """One position of the pool, and its current worker."""

    queue: str
    name: str
    log: IO[bytes]
    clock: Clock
    other: bool
    """Whether its worker is of the other release, if there is one."""
    child: Child | None = None
    fault: str = ""
    """The fault that ends the current worker, or empty."""
    terms: int = 0
    """Number of SIGTERMs sent to the current worker."""
    paused: bool = False


@dataclass
class Counts:
    """Numbers of faults, by kind."""

    faults: Counter[str] = field(default_factory=Counter)
    with_a_job: Counter[str] = field(default_factory=Counter)
    """Faults that affected a worker with a job."""
    poisoned: int = 0
    woken: int = 0
    """Workers that were paused past their lease and went on."""
    starts: int = 0
    problems: list[str] = field(default_factory=list)


class WorkerPool:
    """`each` workers for each queue."""

    def __init__(self, folder: Path, network: Network, plan: Plan, clock_library: Path | None) -> None:
        self.counts = Counts()
        self._folder = folder
        self._network = network
        self._plan = plan
        self._random = Random(f"workers {plan.seed}")
        (folder / "worker.toml").write_text(SETTINGS)
        self._slots = [
            Slot(
                queue, name, (folder / f"{name}.log").open("ab"), Clock(clock_library, folder / f"{name}.clock"), n > 0
            )
            for queue in QUEUES
            for n, name in enumerate(plan.worker_names(queue))
        ]
        self._resuming: set[asyncio.Task[None]] = set()

    async def supervise(self) -> None:
        """Restart workers that have ended. Never returns."""
        while True:
            for slot in self._slots:
                if slot.child is None or slot.child.ended:
                    self._record_exit(slot)
                    self._start(slot)
            await asyncio.sleep(0.05)

    async def inject(self, kind: str, queue: str, busy: bool, pause_s: float, streams: Streams) -> None:
        """Inject a fault into one worker of the queue, or with `kill all` into all of them."""
        held = await self._busy_pids(streams, queue)
        slots = [slot for slot in self._slots if slot.queue == queue]
        if kind != "kill all":
            slots = await self._choose(streams, [slot for slot in slots if not slot.paused], busy)
            held = await self._busy_pids(streams, queue)
        for slot in slots:
            assert slot.child is not None, "supervise() starts each slot first"
            self.counts.faults[kind] += 1
            self.counts.with_a_job[kind] += slot.child.process.pid in held
            if kind == "worker clock":
                slot.clock.set(0 if slot.clock.ahead_s else self._random.choice(STEPS_S))
            elif kind == "pause":
                self._pause(slot, slot.child, pause_s)
            else:
                slot.fault = kind
                slot.terms += kind == "term"
                slot.child.process.send_signal(signal.SIGTERM if kind == "term" else signal.SIGKILL)

    async def _choose(self, streams: Streams, slots: list[Slot], busy: bool) -> list[Slot]:
        """Choose one slot; if `busy`, prefer a worker that has a job or gets one soon."""
        until = time.monotonic() + POLL_S
        while busy and slots and time.monotonic() < until:
            held = {pid for queue in QUEUES for pid in await self._busy_pids(streams, queue)}
            working = [slot for slot in slots if slot.child and slot.child.process.pid in held]
            if working:
                return [self._random.choice(working)]
            await asyncio.sleep(0.05)
        return [self._random.choice(slots)] if slots else []

    async def stop(self) -> None:
        """Resume and terminate all workers; each exit status other than 0 is a problem."""
        for slot in self._slots:
            if slot.child is not None and not slot.child.ended:
                slot.child.process.send_signal(signal.SIGCONT)
                slot.child.process.terminate()
                slot.fault = "term"
                slot.terms += 1
        for slot in self._slots:
            if slot.child is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    await asyncio.to_thread(slot.child.process.wait, STOP_S)
                self._record_exit(slot)

    def kill(self) -> None:
        """Kill all workers."""
        for task in self._resuming:
            task.cancel()
        for slot in self._slots:
            if slot.child is not None:
                slot.child.process.kill()
                slot.child.stop()
            slot.log.close()

    def logged(self) -> Iterator[dict[str, object]]:
        """Parsed lines of the workers' logs."""
        for slot in self._slots:
            for line in (self._folder / f"{slot.name}.log").read_text(errors="replace").splitlines():
                try:
                    yield json.loads(line)
                except ValueError:  # an interpreter warning, or a truncated line of a killed worker
                    continue

    def log_tail(self, slot_name: str, lines: int = 5) -> str:
        """Last lines of a worker's log."""
        return "\n".join((self._folder / f"{slot_name}.log").read_text(errors="replace").splitlines()[-lines:])

    def _start(self, slot: Slot) -> None:
        plan, other = self._plan, self._plan.other_release if slot.other else None
        command: list[str | Path] = list(slot.clock.command)
        if other is None:
            command += [sys.executable, "-m", "tests.chaos.worker"]
        else:
            env = shutil.which("env")
            assert env is not None, "no program `env`"
            command += [env, f"PYTHONPATH={other}", sys.executable, "-P", "-m", "tests.chaos.worker"]
        command += [] if plan.fenced else ["--unfenced"]
        command += ["run", "--config", str(self._folder / "worker.toml")]
        command += ["--redis-url", self._network.links[slot.name].url, "--queue", slot.queue, "--name", slot.name]
        command += ["--max-running", str(plan.max_running)] if plan.max_running > 1 else []
        if slot.queue == "echo":
            command += ["--echo", "--echo-step-ms", str(ECHO_STEP_MS), "--context", str(ECHO_CONTEXT)]
        else:
            command += ["--model", str(self._folder / "tiny.gguf"), "--context", str(TINY_CONTEXT)]
        slot.child, slot.fault, slot.terms, slot.paused = Child(command, slot.log), "", 0, False
        self.counts.starts += 1

    def _record_exit(self, slot: Slot) -> None:
        """Count how a worker ended, and record an unexpected exit status."""
        if slot.child is None:
            return
        if not slot.child.ended:
            self.counts.problems.append(f"{slot.name} did not end within {STOP_S:.0f} s: {self.log_tail(slot.name)}")
            slot.child.process.kill()
        status = slot.child.stop()
        if slot.fault in ("", "term") and status == -signal.SIGKILL:
            self.counts.poisoned += 1
        elif status == -signal.SIGTERM and (slot.terms > 1 or (slot.terms and not self._has_logged(slot))):
            pass  # signal handlers were not installed yet, or already removed
        elif not _is_expected(status, slot):
            tail = self.log_tail(slot.name)
            self.counts.problems.append(f"{slot.name} ended with {status} after {slot.fault or 'nothing'}: {tail}")
        slot.child = None

    def _has_logged(self, slot: Slot) -> bool:
        """Whether the worker has logged, after which it handles signals."""
        assert slot.child is not None, "called before the child is cleared"
        return f'"{slot.name}-{slot.child.process.pid}-' in (self._folder / f"{slot.name}.log").read_text()

    def _pause(self, slot: Slot, child: Child, seconds: float) -> None:
        async def resume() -> None:
            await asyncio.sleep(seconds)
            slot.paused = False
            self.counts.woken += not child.ended
            child.process.send_signal(signal.SIGCONT)

        child.process.send_signal(signal.SIGSTOP)
        slot.paused = True
        task = asyncio.create_task(resume())
        self._resuming.add(task)
        task.add_done_callback(self._resuming.discard)

    async def _busy_pids(self, streams: Streams, queue: str) -> set[int]:
        """Process ids of workers with a pending entry; a worker's id is name-pid-random."""
        rows = await retry_until_connected(streams.pending, queue, 1000)
        return {int(row.consumer.split("-")[-2]) for row in rows}


def _is_expected(status: int, slot: Slot) -> bool:
    """Whether a worker ends with this status; SIGKILL may meet one that SIGTERM has just ended."""
    return (status == 0 and slot.terms > 0) or (status == -signal.SIGKILL and slot.fault != "term")
