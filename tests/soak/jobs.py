"""Jobs whose answers are known beforehand, and their readers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import cycle, islice

from tests.jobs.stream_checker import violations
from worker.errors import WorkerError
from worker.jobs.client import Client
from worker.jobs.events import ErrorEvent, Token
from worker.jobs.keys import START, events_key
from worker.jobs.streams import Disconnected, Record, Streams

PARALLEL = 100


@dataclass(frozen=True)
class EchoJob:
    """A job of the echo model; each has another answer."""

    job_id: str
    tokens: int

    @property
    def prompt(self) -> str:
        return f"{self.job_id}."

    @property
    def answer(self) -> str:
        """The prompt's characters, each a token, repeated up to the number of tokens."""
        return "".join(islice(cycle(self.prompt), self.tokens))

    async def submit(self, client: Client) -> None:
        await client.submit(job_id=self.job_id, prompt=self.prompt, max_tokens=self.tokens)


@dataclass
class Reading:
    """What a reader received of one job."""

    indices: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    ending: str = "none"
    """`end`, an error's code, or `none`."""
    delays_ms: list[float] = field(default_factory=list)
    """From the writing of each event to its arrival."""
    arrivals_s: list[float] = field(default_factory=list)
    """Monotonic times at which tokens arrived."""
    began: asyncio.Event = field(default_factory=asyncio.Event)
    """Set with the first token."""
    ended_s: float = 0.0
    position: str = START
    """The id to continue at."""

    async def follow(self, client: Client, job_id: str) -> None:
        """Read the job to its end, from where an earlier call was cancelled."""
        try:
            async for item in client.events(job_id, self.position, next_i=len(self.indices)):
                self.position = item.resume
                self.delays_ms.append(time.time() * 1000 - item.envelope.ts_ms)
                if isinstance(item.event, Token):
                    self.indices.append(item.event.i)
                    self.text.append(item.event.t)
                    self.arrivals_s.append(time.monotonic())
                    self.began.set()
                elif item.event.terminal:
                    self.ending = item.event.code if isinstance(item.event, ErrorEvent) else item.event.kind
        except (WorkerError, Disconnected) as error:
            self.ending = f"{type(error).__name__}: {error}"
        finally:
            self.ended_s = time.monotonic()
            self.began.set()

    def problems(self, job: EchoJob, ending: str = "end") -> list[str]:
        """Differences from the job's answer; with another ending than `end`, from its beginning."""
        found = [] if self.ending == ending else [f"{job.job_id} ended with {self.ending}, expected {ending}"]
        if self.indices != list(range(len(self.indices))):
            found.append(f"{job.job_id}: its reader received the indices {self.indices}")
        text, expected = "".join(self.text), job.answer
        if text != (expected if ending == "end" else expected[: len(text)]):
            found.append(f"{job.job_id}: its reader received {text!r}, expected {expected!r}")
        return found


async def records_of(streams: Streams, job_ids: Iterable[str]) -> dict[str, list[Record]]:
    """The event streams of jobs."""
    found: dict[str, list[Record]] = {}
    waiting = iter(list(job_ids))

    async def read() -> None:
        for job_id in waiting:
            found[job_id] = await streams.range(events_key(job_id), "-", "+", 1_000_000)

    await asyncio.gather(*(read() for _ in range(PARALLEL)))
    return found


def stream_problems(records: Mapping[str, list[Record]], jobs: Iterable[EchoJob]) -> list[str]:
    """Violations of the protocol, and answers that differ."""
    return [problem for job in jobs for problem in violations(job.job_id, records[job.job_id], job.answer)]
