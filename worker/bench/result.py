"""Records of a benchmark: figures with spread and bytes moved, the machine, the model.

`worker bench --json` prints a Result as one object; `benchmarks/recorded.py` reads it.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

SCHEMA = 1
"""Grows when a key changes its meaning; a key may be added at any time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One speed or time: the median of several runs, with the bytes that one run moves."""

    at: int | str
    """Tokens of context or of the prompt, or the name of what was varied."""
    unit: str
    """tokens/s, s, ms or µs."""
    median: float
    low: float
    """Minimum of the runs; `high` is the maximum."""
    high: float
    runs: int
    bytes: int
    """Bytes of one token, one prompt or one load; see `traffic.py`."""
    gb_s: float
    """`bytes` per median time, in 1e9 bytes per second."""
    percent: float
    """Share of the read bandwidth measured in the same run."""
    p95: float | None = None
    """First tokens: 95th percentile."""
    limit: float | None = None
    """Decode and prefill: tokens/s if reading the bytes at the measured bandwidth took all time;
    prefill on a known GPU: or if products and attention did, whichever is lower."""
    floor: float | None = None
    """Throughput: tokens/s in all at the floor of a step's time; see `Traffic.step_floor_s`."""
    context: int | None = None
    """Throughput: tokens to which each sequence attends in the middle of a run, on average."""
    tflops: float | None = None
    """Prefill: 1e12 operations per second in matrix products with weights."""
    extra_us: float | None = None
    """Sampler: µs per token beyond greedy, the median of pairs of runs."""

    @property
    def step_us(self) -> float:
        """Throughput: µs of a decode step of `at` sequences."""
        return 1e6 * int(self.at) / self.median

    @property
    def floor_percent(self) -> float:
        """Throughput: the speed as a share of that at the floor."""
        assert self.floor is not None, "only throughput has a floor"
        return 100 * self.median / self.floor

    def to_json(self) -> dict[str, Any]:
        """The fields that are not None."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The machine and software of a run; None where not applicable."""

    device: str
    backend: str
    cores: int
    driver: str | None
    cuda: str | None
    cupy: str | None
    numpy: str
    python: str

    @property
    def versions(self) -> str:
        """The software that affects the figures, for people."""
        known = {"driver": self.driver, "CUDA": self.cuda, "CuPy": self.cupy, "Python": self.python}
        return ", ".join(f"{name} {version}" for name, version in known.items() if version)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """The measured model. Sizes are on the device, except `file_bytes`."""

    name: str
    file: str
    """File name without folder."""
    fingerprint: str
    architecture: str
    context: int
    file_bytes: int
    weight_bytes: int
    kv_bytes_per_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The result of one run of `worker bench`."""

    schema: int = SCHEMA
    at: str
    """Time of the run, UTC, ISO 8601."""
    version: str
    commit: str | None
    """Commit of the checkout, with -dirty if modified; None outside a checkout."""
    machine: Machine
    model: ModelFacts
    bandwidth_gb_s: float
    """Median read bandwidth over `bandwidth_bytes`; the next two are the extremes."""
    bandwidth_low: float
    bandwidth_high: float
    bandwidth_bytes: int
    figures: dict[str, list[Figure]]
    """Figures by measurement:

    decode       through the engine, by tokens of context before the first timed token
    prefill      through the engine, from `add` to the first token, by tokens of the prompt
    throughput   decode of `at` sequences at once, tokens/s in all, if requested
    first_token  at `engine`, and at `server`: from before the XADD to the token at the client
    load         from opening the file to a ready engine: `first` (may compile kernels) and `again`
    start        from starting a worker process to `ready`, with file and kernels in their caches
    sampler      decode by sampling setting
    answer       one long answer at `engine`, and at `server` as the client receives it
    """
    server_share: float | None = None
    """Median speed of answers at the server divided by that at the engine; None if not measured."""

    def to_json(self) -> dict[str, Any]:
        """Nested dicts and lists; fields of a figure that are None are left out."""
        return asdict(self) | {"figures": figures_to_json(self.figures)}


def figures_to_json(figures: Mapping[str, Sequence[Figure]]) -> dict[str, list[dict[str, Any]]]:
    """The figures of each measurement, without the fields that are None."""
    return {name: [each.to_json() for each in group] for name, group in figures.items()}


def number(value: float) -> str:
    """Format with at least three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """The device's read bandwidth, from the seconds of several runs over `nbytes`."""

    nbytes: int
    seconds: Sequence[float]

    @property
    def gb_s(self) -> float:
        """The median, in 1e9 bytes per second."""
        return self.nbytes / statistics.median(self.seconds) / 1e9

    def figure(
        self,
        at: int | str,
        unit: str,
        value: Callable[[float], float],
        seconds: Sequence[float],
        nbytes: int,
        **more: Any,
    ) -> Figure:
        """Summarize runs that took `seconds`; `value` converts seconds to the unit."""
        median = statistics.median(seconds)
        low, high = sorted((value(min(seconds)), value(max(seconds))))
        gb_s, runs = nbytes / median / 1e9, len(seconds)
        return Figure(
            at=at, unit=unit, median=value(median), low=low, high=high, runs=runs, bytes=nbytes,
            gb_s=gb_s, percent=100 * gb_s / self.gb_s, **more
        )  # fmt: skip

    def speed(self, at: int | str, seconds: Sequence[float], nbytes: int, tokens: int = 1, **more: Any) -> Figure:
        """Tokens per second of runs in which `tokens` tokens took `seconds` and moved `nbytes`."""
        return self.figure(at, "tokens/s", lambda each: tokens / each, seconds, nbytes, **more)

    def load(self, at: str, seconds: Sequence[float], nbytes: int) -> Figure:
        """Seconds of loads."""
        return self.figure(at, "s", lambda each: each, seconds, nbytes)

    def first_tokens(self, at: str, seconds: Sequence[float], nbytes: int) -> Figure:
        """Times to first tokens in ms, with their 95th percentile."""
        p95 = 1000 * float(np.percentile(seconds, 95))
        return self.figure(at, "ms", lambda each: 1000 * each, seconds, nbytes, p95=p95)
