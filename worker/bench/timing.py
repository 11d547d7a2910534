"""Time to the first token and time per later token, of an engine on this thread and of jobs.

Jobs are served by a `worker run` process, with this process as the client, one job at a time.
`benchmarks/` uses the same functions.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from worker.embedded import Child, worker_process
from worker.engine import Engine
from worker.engine import Sequence as Request
from worker.errors import Internal
from worker.jobs.client import Client
from worker.jobs.reader import JobFailed
from worker.sampling import Sampling

_READY_S = 180.0

GREEDY = Sampling(temperature=0, ignore_eos=True)
SAMPLINGS = {
    "greedy": GREEDY,
    "temperature 1": Sampling(seed=1, ignore_eos=True),
    "top-k 40, top-p 0.9": Sampling(seed=1, top_k=40, top_p=0.9, ignore_eos=True),
    "top-p 0.9": Sampling(seed=1, top_p=0.9, ignore_eos=True),
}
Timed = tuple[float, float]
"""Seconds to the first token, and seconds per token after it."""
_T = TypeVar("_T")


class Together(NamedTuple):
    """Decode of several sequences at once."""

    step_s: float
    """Seconds of a step, in which each sequence generates one token."""
    context: int
    """Tokens to which a sequence attends in the middle of the run, on average."""


class Prompts:
    """Distinct random prompts, so that no prefix cache hits; the same in every benchmark run."""

    def __init__(self, vocabulary: int) -> None:
        self._rng = np.random.default_rng(0)
        self._vocabulary = vocabulary

    def next(self, tokens: int) -> list[int]:
        """Return a prompt of `tokens` ids."""
        ids: list[int] = self._rng.integers(0, self._vocabulary, tokens).tolist()
        return ids


def timed(engine: Engine, prompt: Sequence[int], tokens: int, sampling: Sampling = GREEDY) -> Timed:
    """Generate `tokens` tokens after a prompt; time from `Engine.add`."""
    began = time.perf_counter()
    engine.add(Request("bench", list(prompt), tokens, sampling))
    while not engine.step():
        pass
    first = time.perf_counter()
    while not engine.idle:
        engine.step()
    return first - began, (time.perf_counter() - first) / max(1, tokens - 1)


def repeated(measure: Callable[[], _T], min_runs: int, budget_s: float) -> list[_T]:
    """Measure at least `min_runs` times, and more while the budget lasts."""
    until, runs = time.perf_counter() + budget_s, [measure() for _ in range(min_runs)]
    while time.perf_counter() < until:
        runs.append(measure())
    return runs


def spare(sequences: int) -> int:
    """Tokens that a sequence may generate while the prompts of later ones are computed."""
    return sequences + 16


def together(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int) -> Together:
    """Time steps in which all `prompts` are continued greedily at once.

    Timed are `tokens` tokens of each sequence, from the step in which the last prompt gets its
    first token on. No sequence ends meanwhile.
    """
    for index, prompt in enumerate(prompts):
        engine.add(Request(f"bench-{index}", list(prompt), tokens + spare(len(prompts)), GREEDY))
    started: set[str] = set()
    known = sum(map(len, prompts))
    while len(started) < len(prompts):
        drawn = engine.step()
        known += len(drawn)
        started.update(each.sequence_id for each in drawn)
    began, left = time.perf_counter(), tokens * len(prompts)
    while left > 0:
        left -= len(engine.step())
        assert not engine.idle, "the sequences ended before all tokens were timed"
    seconds = time.perf_counter() - began
    for sequence_id in engine.active:
        engine.abort(sequence_id)
    steps = tokens - left / len(prompts)
    return Together(seconds / steps, round(known / len(prompts) + steps / 2))


def samplers(engine: Engine, prompts: Prompts, prompt: int, tokens: int, runs: int) -> dict[str, list[float]]:
    """Measure seconds per token by sampling setting; alternates so that drift affects all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in SAMPLINGS}
    for turn in range(runs + 1):
        for name, sampling in SAMPLINGS.items():
            _, a_token = timed(engine, prompts.next(prompt), tokens, sampling)
            if turn:  # the first turn is a warm-up
                seconds[name].append(a_token)
    return seconds


@dataclass(frozen=True, slots=True)
class Jobs:
    """Jobs with prompts of `prompt` tokens: `first_tokens` of one token, `answers` of `tokens`."""

    prompt: int
    first_tokens: int
    answers: int
    tokens: int


def timed_jobs(
    path: Path, url: str, options: Sequence[str], jobs: Jobs, prompt: Callable[[int], list[int]]
) -> tuple[list[float], list[Timed]]:
    """Return the seconds from before each XADD to the first token, and the times of long answers.

    Raises Internal with the worker's last log line if it does not become ready or fails a job.
    """
    return _with_worker(path, url, options, lambda child: _measure(url, child, jobs, prompt))


def timed_start(path: Path, url: str, options: Sequence[str]) -> float:
    """Return the seconds from starting a worker process until the server has its state `ready`.

    Raises Internal as `timed_jobs` does.
    """

    async def ready(child: Child) -> float:
        async with Client.from_url(url) as client:
            await _ready(client, child)
        return time.perf_counter()

    began = time.perf_counter()
    return _with_worker(path, url, options, ready) - began


def _with_worker(
    path: Path, url: str, options: Sequence[str], measure: Callable[[Child], Coroutine[None, None, _T]]
) -> _T:
    """Start a worker process, await `measure` of it, and stop it."""
    with worker_process("bench", path, url, "--log-level", "error", *options) as (child, log):
        try:
            return asyncio.run(measure(child))
        except (JobFailed, TimeoutError) as error:
            log.seek(0)
            last_line = log.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise Internal(f"the worker process failed: {error}: {last_line or 'its log is empty'}") from error


async def _measure(
    url: str, child: Child, jobs: Jobs, prompt: Callable[[int], list[int]]
) -> tuple[list[float], list[Timed]]:
    async with Client.from_url(url) as client:
        await _ready(client, child)
        await _timed_job(client, prompt(jobs.prompt), jobs.tokens)  # warm-up
        first = [(await _timed_job(client, prompt(jobs.prompt), 1))[0] for _ in range(jobs.first_tokens)]
        return first, [await _timed_job(client, prompt(jobs.prompt), jobs.tokens) for _ in range(jobs.answers)]


async def _ready(client: Client, child: Child) -> None:
    deadline = time.monotonic() + _READY_S
    while not any(status.get("state") == "ready" for status in (await client.workers()).values()):
        if child.ended or time.monotonic() > deadline:
            raise TimeoutError("it did not become ready")
        await asyncio.sleep(0.01)


async def _timed_job(client: Client, prompt: list[int], tokens: int) -> Timed:
    """Submit one job and read its tokens to the end."""
    await asyncio.sleep(0.02)  # until the worker has acknowledged the last job and waits for the next
    began = time.perf_counter()
    job_id = await client.submit(prompt_tokens=prompt, max_tokens=tokens, temperature=0, ignore_eos=True)
    first = last = 0.0
    async for _ in client.tokens(job_id, idle_s=60):
        last = time.perf_counter()
        first = first or last
    return first - began, (last - first) / max(1, tokens - 1)
