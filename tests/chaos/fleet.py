"""The workers of a run: real `worker run` processes, each started again when it ends, and what is done to them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import IO

from tests.chaos.questions import ECHO_CONTEXT, POOLS, PREFILL_CHUNK, TINY_CONTEXT
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
STOP_S = 20.0
PATIENCE = 100
"""How often to look for a worker that has a job."""


@dataclass
class Slot:
    """A place for one worker after the other."""

    pool: str
    name: str
    log: IO[bytes]
    child: Child | None = None
    blow: str = ""
    """What was done to this worker, if anything that ends it."""
    terms: int = 0
    """How often it was told to end."""
    paused: bool = False


@dataclass
class Tally:
    """What happened to workers, by kind."""

    blows: Counter[str] = field(default_factory=Counter)
    with_a_job: Counter[str] = field(default_factory=Counter)
    """Those of them that met a worker with a job."""
    poisoned: int = 0
    starts: int = 0
    wrong: list[str] = field(default_factory=list)


class Fleet:
    """`each` workers for each pool."""

    def __init__(self, folder: Path, url: str, seed: int, each: int, fenced: bool = True) -> None:
        self.tally = Tally()
        self._folder = folder
        self._url = url
        self._fenced = fenced
        self._random = Random(f"fleet {seed}")
        self._stopping = False
        (folder / "worker.toml").write_text(SETTINGS)
        names = [(pool, f"{pool}{n}") for pool in POOLS for n in range(each)]
        self._slots = [Slot(pool, name, (folder / f"{name}.log").open("ab")) for pool, name in names]
        self._resuming: set[asyncio.Task[None]] = set()

    async def keep_up(self) -> None:
        """Start whoever is missing, for ever."""
        while True:
            for slot in self._slots:
                if slot.child is None or slot.child.ended:
                    self._buried(slot)
                    self._start(slot)
            await asyncio.sleep(0.05)

    async def strike(self, kind: str, pool: str, busy: bool, pause_s: float, streams: Streams) -> None:
        """Do to one worker of the pool, or to all of them, what `kind` says."""
        held = await self._holders(streams, pool)
        slots = [slot for slot in self._slots if slot.pool == pool]
        if kind != "kill all":
            slots = await self._one(streams, [slot for slot in slots if not slot.paused], busy)
            held = await self._holders(streams, pool)
        for slot in slots:
            assert slot.child is not None, "every slot has had a worker"
            self.tally.blows[kind] += 1
            self.tally.with_a_job[kind] += slot.child.process.pid in held
            if kind == "pause":
                self._pause(slot, slot.child, pause_s)
            else:
                slot.blow = kind
                slot.terms += kind == "term"
                slot.child.process.send_signal(signal.SIGTERM if kind == "term" else signal.SIGKILL)

    async def _one(self, streams: Streams, slots: list[Slot], busy: bool) -> list[Slot]:
        """One of the slots, whose worker has a job if that is wanted and comes soon; none of none."""
        for _ in range(PATIENCE if busy else 0):
            held = {pid for pool in POOLS for pid in await self._holders(streams, pool)}
            working = [slot for slot in slots if slot.child and slot.child.process.pid in held]
            if working:
                return [self._random.choice(working)]
            await asyncio.sleep(0.05)
        return [self._random.choice(slots)] if slots else []

    async def stop(self) -> None:
        """Let everybody go on and then leave in order; every exit status but 0 is noted as wrong."""
        for slot in self._slots:
            if slot.child is not None and not slot.child.ended:
                slot.child.process.send_signal(signal.SIGCONT)
                slot.child.process.terminate()
                slot.blow = "term"
                slot.terms += 1
        for slot in self._slots:
            if slot.child is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    await asyncio.to_thread(slot.child.process.wait, STOP_S)
                self._buried(slot)

    def kill(self) -> None:
        """End all, whatever state they are in."""
        for task in self._resuming:
            task.cancel()
        for slot in self._slots:
            if slot.child is not None:
                slot.child.process.kill()
                slot.child.stop()
            slot.log.close()

    def logged(self) -> Iterator[dict[str, object]]:
        """What the workers logged, line by line."""
        for slot in self._slots:
            for line in (self._folder / f"{slot.name}.log").read_text(errors="replace").splitlines():
                try:
                    yield json.loads(line)
                except ValueError:  # a warning of the interpreter, or half a line of a worker that was killed
                    continue

    def last_words(self, slot_name: str, lines: int = 5) -> str:
        """The end of a worker's log."""
        return "\n".join((self._folder / f"{slot_name}.log").read_text(errors="replace").splitlines()[-lines:])

    def _start(self, slot: Slot) -> None:
        command = [sys.executable, "-m", "tests.chaos.worker", *([] if self._fenced else ["--unfenced"]), "run"]
        command += ["--config", str(self._folder / "worker.toml"), "--redis-url", self._url]
        command += ["--queue", slot.pool, "--name", slot.name]
        if slot.pool == "echo":
            command += ["--echo", "--echo-step-ms", str(ECHO_STEP_MS), "--context", str(ECHO_CONTEXT)]
        else:
            command += ["--model", str(self._folder / "tiny.gguf"), "--context", str(TINY_CONTEXT)]
        slot.child, slot.blow, slot.terms, slot.paused = Child(command, slot.log), "", 0, False
        self.tally.starts += 1

    def _buried(self, slot: Slot) -> None:
        """Note how a worker ended."""
        if slot.child is None:
            return
        if not slot.child.ended:
            self.tally.wrong.append(f"{slot.name} did not end within {STOP_S:.0f} s: {self.last_words(slot.name)}")
            slot.child.process.kill()
        status = slot.child.stop()
        if slot.blow in ("", "term") and status == -signal.SIGKILL:
            self.tally.poisoned += 1
        elif status == -signal.SIGTERM and (slot.terms > 1 or (slot.terms and not self._has_spoken(slot))):
            pass  # Python was still importing, or leaving
        elif status != (0 if slot.blow == "term" else -signal.SIGKILL):
            said = self.last_words(slot.name)
            self.tally.wrong.append(f"{slot.name} ended with {status} after {slot.blow or 'nothing'}: {said}")
        slot.child = None

    def _has_spoken(self, slot: Slot) -> bool:
        """Whether the worker got so far that it obeys signals."""
        assert slot.child is not None, "asked before it is forgotten"
        return f'"{slot.name}-{slot.child.process.pid}-' in (self._folder / f"{slot.name}.log").read_text()

    def _pause(self, slot: Slot, child: Child, seconds: float) -> None:
        async def go_on() -> None:
            await asyncio.sleep(seconds)
            slot.paused = False
            child.process.send_signal(signal.SIGCONT)

        child.process.send_signal(signal.SIGSTOP)
        slot.paused = True
        task = asyncio.create_task(go_on())
        self._resuming.add(task)
        task.add_done_callback(self._resuming.discard)

    async def _holders(self, streams: Streams, pool: str) -> set[int]:
        """Process ids of workers that hold an entry; a worker's id ends with its process's id and a random part."""
        rows = await retry_until_connected(streams.pending, pool, 100)
        return {int(row.consumer.split("-")[-2]) for row in rows}
