"""What a benchmark says: figures with their spread and their bytes, the machine, the model. `worker bench --json`
prints a Result as one object whose keys are these fields; `benchmarks/` reads it. Knows nothing of measuring.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

SCHEMA = 1
"""Grows when a key changes its meaning; a key may be added at any time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One speed or time: the median of several runs, beside the bytes that the median run had to move."""

    at: int | str
    """Tokens of context or of the prompt, or the name of what was varied."""
    unit: str
    """tokens/s, ms or s."""
    median: float
    low: float
    """The least of the runs, as `high` is the greatest."""
    high: float
    runs: int
    bytes: int
    """What `traffic.py` counts for one unit of the work: one token, one prompt, one load."""
    gb_s: float
    """Those bytes in the median time, in 1e9 bytes a second."""
    percent: float
    """Of the read bandwidth that the same run measured."""
    p95: float | None = None
    """First tokens: 95 of 100 came within it."""
    limit: float | None = None
    """Decode: tokens a second if the bytes came at the measured bandwidth and nothing else took time."""
    tflops: float | None = None
    """Prefill: 1e12 operations a second in products with weights."""
    extra_us: float | None = None
    """Sampler: µs a token beyond greedy's, the median of pairs of runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where it was measured. What there is none of is None."""

    device: str
    backend: str
    cores: int
    driver: str | None
    cuda: str | None
    cupy: str | None
    numpy: str
    python: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What was measured. Bytes are those on the device but for the file's."""

    name: str
    file: str
    """The file's name without its folder."""
    fingerprint: str
    architecture: str
    context: int
    file_bytes: int
    weight_bytes: int
    kv_bytes_per_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Everything that one run of `worker bench` found."""

    schema: int = SCHEMA
    at: str
    """When, UTC, ISO 8601."""
    version: str
    commit: str | None
    """The checkout's, with -dirty where files differ from it; None outside of one."""
    machine: Machine
    model: ModelFacts
    bandwidth_gb_s: float
    """The median of reading `bandwidth_bytes` and nothing else, as `bandwidth_low` and `_high` are its extremes."""
    bandwidth_low: float
    bandwidth_high: float
    bandwidth_bytes: int
    figures: dict[str, list[Figure]]
    """By what was measured:

    decode       through the engine, by tokens of context before the first that is timed
    prefill      through the engine, from `add` to the first token, by tokens of the prompt
    first_token  at `engine`, and at `server`: from before the XADD to the token at the reader, the worker idle
    load         from the file's opening to a ready engine: `first`, in whose time kernels may compile, and `again`
    sampler      decode by way of drawing
    answer       one long answer at `engine`, and at `server` as its reader sees it
    """
    server_share: float
    """The median of the answers at the server over that at the engine."""

    def to_json(self) -> dict[str, Any]:
        """Nested dicts and lists; fields of a figure that are None are left out."""
        given = {name: [_given(figure) for figure in figures] for name, figures in self.figures.items()}
        return asdict(self) | {"figures": given}


def _given(figure: Figure) -> dict[str, Any]:
    return {key: value for key, value in asdict(figure).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """What the device reads at when it does nothing else, from the seconds of several runs over `nbytes`."""

    nbytes: int
    seconds: Sequence[float]

    @property
    def gb_s(self) -> float:
        """The median."""
        return self.nbytes / statistics.median(self.seconds) / 1e9

    def speed(self, at: int | str, seconds: Sequence[float], nbytes: int, tokens: int = 1, **more: Any) -> Figure:
        """Tokens a second, of runs in which `tokens` tokens took `seconds` and moved `nbytes` together."""
        return self._figure(at, "tokens/s", lambda each: tokens / each, seconds, nbytes, **more)

    def time(self, at: int | str, unit: str, seconds: Sequence[float], nbytes: int, **more: Any) -> Figure:
        """The seconds themselves, as s or ms."""
        scale = {"s": 1, "ms": 1000}[unit]
        return self._figure(at, unit, lambda each: scale * each, seconds, nbytes, **more)

    def first_tokens(self, at: str, seconds: Sequence[float], nbytes: int) -> Figure:
        """Times to first tokens in ms, with their 95th percentile."""
        return self.time(at, "ms", seconds, nbytes, p95=1000 * float(np.percentile(seconds, 95)))

    def _figure(
        self,
        at: int | str,
        unit: str,
        value: Callable[[float], float],
        seconds: Sequence[float],
        nbytes: int,
        **more: Any,
    ) -> Figure:
        median = statistics.median(seconds)
        low, high = sorted((value(min(seconds)), value(max(seconds))))
        return Figure(
            at=at,
            unit=unit,
            median=value(median),
            low=low,
            high=high,
            runs=len(seconds),
            bytes=nbytes,
            gb_s=nbytes / median / 1e9,
            percent=100 * nbytes / median / 1e9 / self.gb_s,
            **more,
        )
