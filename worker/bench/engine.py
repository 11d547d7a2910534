"""The engine alone, on this thread: seconds to first tokens and seconds a token after them. Knows no server."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from worker.engine import Engine
from worker.engine import Sequence as Request
from worker.sampling import Sampling

GREEDY = Sampling(temperature=0, ignore_eos=True)
SAMPLINGS = {
    "greedy": GREEDY,
    "temperature 1": Sampling(seed=1, ignore_eos=True),
    "top-k 40, top-p 0.9": Sampling(seed=1, top_k=40, top_p=0.9, ignore_eos=True),
    "top-p 0.9": Sampling(seed=1, top_p=0.9, ignore_eos=True),
}
Timed = tuple[float, float]
"""Seconds to the first token, and seconds a token after it."""


class Prompts:
    """Random prompts, no two alike, so that no cache knows any; the same ones in every run of the benchmark."""

    def __init__(self, vocabulary: int) -> None:
        self._rng = np.random.default_rng(0)
        self._vocabulary = vocabulary

    def next(self, tokens: int) -> list[int]:
        """`tokens` ids."""
        ids: list[int] = self._rng.integers(0, self._vocabulary, tokens).tolist()
        return ids


def timed(engine: Engine, prompt: Sequence[int], tokens: int, sampling: Sampling = GREEDY) -> Timed:
    """Answer a prompt with `tokens` tokens, from `add` on."""
    began = time.perf_counter()
    engine.add(Request("bench", list(prompt), tokens, sampling))
    while not engine.step():
        pass
    first = time.perf_counter()
    while not engine.idle:
        engine.step()
    return first - began, (time.perf_counter() - first) / max(1, tokens - 1)


def repeated(measure: Callable[[], Timed], least: int, budget_s: float) -> list[Timed]:
    """`least` runs or more, as many as the budget allows."""
    until, runs = time.perf_counter() + budget_s, [measure() for _ in range(least)]
    while time.perf_counter() < until:
        runs.append(measure())
    return runs


def samplers(engine: Engine, prompts: Prompts, prompt: int, tokens: int, runs: int) -> dict[str, list[float]]:
    """Seconds a token by way of drawing; the ways take turns, so that what drifts meets them all."""
    seconds: dict[str, list[float]] = {name: [] for name in SAMPLINGS}
    for turn in range(runs + 1):
        for name, sampling in SAMPLINGS.items():
            _, a_token = timed(engine, prompts.next(prompt), tokens, sampling)
            if turn:  # the first one warms up
                seconds[name].append(a_token)
    return seconds


def beyond_greedy_us(seconds: dict[str, list[float]], name: str) -> float:
    """What a way of drawing adds to a greedy token, µs: the median over the turns."""
    return 1e6 * statistics.median(a - b for a, b in zip(seconds[name], seconds["greedy"], strict=True))
