"""The measurements of one `worker bench` run, in order.

Read bandwidth, the engine alone, repeated loads, then the model behind a server: the worker process
comes last and has the device to itself. `traffic.py` defines the bytes, `timing.py` the timings.
"""

from __future__ import annotations

import gc
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np

from worker import __version__, runtime
from worker.backend import Backend
from worker.bench import timing
from worker.bench.result import Bandwidth, Figure, Machine, ModelFacts, Result
from worker.bench.traffic import Traffic
from worker.config import EngineSection, Settings
from worker.embedded import embedded_server
from worker.engine import Engine
from worker.engine.kv_blocks import blocks_for
from worker.errors import ConfigInvalid
from worker.gguf_file import GgufFile
from worker.ops import KV_BLOCK

RUNS = 5
_AT_ONCE = (1, 8, 32, 64, 128, 256)
_THROUGHPUT_RUNS = 3
_F16_OPERATIONS_PER_S = {"H100": 6.5e14, "H200": 6.5e14}
"""Rate of f16 products that a card sustains, by a part of its name: two thirds of the peak."""
_INT8_OPERATIONS_PER_S = {"H100": 1.5e15, "H200": 1.5e15}
"""Rate of int8 products that a card sustains, by a part of its name: three quarters of the peak."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the measurements; lengths in tokens."""

    read_bytes: int
    lengths: tuple[int, ...]
    """Prompt lengths, and context lengths of decode."""
    tokens: int
    """Tokens decoded at each length."""
    first: int
    """Prompt length of the time to first token, measured `first_tokens` times each way."""
    answer: int
    """Length of the answers compared with and without a server."""
    first_tokens: int = 40
    starts: int = 3
    """Worker processes started one after the other."""
    together: int = 8
    """Tokens of each of several sequences that generate at once, after prompts of `first`."""
    budget_s: float = 0.3
    """More than RUNS runs if they fit into this time."""

    def longest(self, sequences: int) -> int:
        """Tokens of each of several sequences that generate at once."""
        return self.first + self.together + timing.spare(sequences)

    def within(self, context: int, sequences: int) -> Sizes:
        """Return the sizes that fit the context. Raises ConfigInvalid if too few fit."""
        required = max(self.first + self.answer, min(self.lengths) + self.tokens)
        if sequences > 1:
            required = max(required, self.longest(sequences))
        if required > context:
            raise ConfigInvalid(f"a context of {context} tokens is too short; pass at least {required}")
        return replace(self, lengths=tuple(n for n in self.lengths if n + self.tokens <= context))


SIZES = {
    "gpu": Sizes(4 << 30, (128, 512, 1024, 2048, 3500, 8192), tokens=48, first=128, answer=256, together=127),
    "cpu": Sizes(512 << 20, (32, 128, 512), tokens=8, first=32, answer=32, together=8),
}


def run(path: Path, settings: Settings, on_phase: Callable[[str], None]) -> Result:
    """Measure a model as `worker run` would serve it; `on_phase` receives each measurement's name.

    Raises what loading raises; ConfigInvalid if no server can be embedded or the context is too
    short; Internal if the worker process fails.
    """
    with embedded_server() as url:
        bench = Bench.prepare(path, settings, on_phase)
        bench.engine_alone()
        if settings.engine.max_running > 1:
            bench.throughput()
        bench.loads()
        bench.behind_a_server(url)
    return bench.result()


def run_throughput(path: Path, settings: Settings, on_phase: Callable[[str], None]) -> Result:
    """Measure only decode of several sequences at once, up to `engine.max_running`.

    Raises what loading raises; ConfigInvalid if the context is too short.
    """
    bench = Bench.prepare(path, settings, on_phase)
    bench.throughput()
    return bench.result()


@dataclass
class Bench:
    """The measurements of one model: each method adds to `figures`, those of the Result."""

    path: Path
    settings: Settings
    sizes: Sizes
    traffic: Traffic
    bandwidth: Bandwidth
    backend: Backend
    file_bytes: int
    on_phase: Callable[[str], None]
    figures: dict[str, list[Figure]] = field(default_factory=dict)
    model: ModelFacts | None = None
    """Set by the first load."""

    @classmethod
    def prepare(cls, path: Path, settings: Settings, on_phase: Callable[[str], None]) -> Bench:
        """Read the file's header and measure the read bandwidth. Raises as `run` does.

        Speculation is off: a step is one token of each sequence. A KV pool that holds one context
        by default is made to hold `engine.max_running` sequences.
        """
        engine = settings.engine.model_copy(update={"speculation": "off"})
        settings = settings.model_copy(update={"engine": engine})
        with GgufFile.open(path) as file:
            file_bytes, backend = file.tensor_bytes, runtime.open_backend(engine)
            planned = runtime.plan(file, settings.model, backend, engine.kv_memory, engine.max_running)
            sizes = SIZES[backend.name].within(planned.context, engine.max_running)
            required = engine.max_running * blocks_for(sizes.longest(engine.max_running))
            if planned.kv_blocks < required and engine.kv_memory == "auto" and not backend.kv_share:
                nbytes = max(required * KV_BLOCK * planned.kv_bytes_per_token, 1 << 20)
                settings = settings.model_copy(update={"engine": engine.model_copy(update={"kv_memory": nbytes})})
                planned = runtime.plan(file, settings.model, backend, nbytes, engine.max_running)
        if planned.kv_blocks < required:
            raise ConfigInvalid(
                f"{engine.max_running} sequences of the benchmark need {required:,} KV blocks and there are "
                f"{planned.kv_blocks:,}; pass a lower --max-running or raise engine.kv_memory"
            )
        on_phase("read bandwidth")
        bandwidth = _read_bandwidth(backend, engine, sizes.read_bytes)
        traffic = Traffic(planned, backend.weight_bytes)
        return cls(path, settings, sizes, traffic, bandwidth, backend, file_bytes, on_phase)

    def __post_init__(self) -> None:
        self._prompts = timing.Prompts(self.traffic.planned.hparams.vocab_size)

    def result(self) -> Result:
        """The result with what was measured so far; at least one model was loaded."""
        bandwidth, model = self.bandwidth, self.model
        assert model is not None, "no model was loaded"
        answers = [figure.median for figure in self.figures.get("answer", ())]  # of engine and server
        return Result(
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            version=__version__,
            commit=checkout_commit(),
            machine=_machine(self.backend),
            model=model,
            bandwidth_gb_s=bandwidth.gb_s,
            bandwidth_low=bandwidth.nbytes / max(bandwidth.seconds) / 1e9,
            bandwidth_high=bandwidth.nbytes / min(bandwidth.seconds) / 1e9,
            bandwidth_bytes=bandwidth.nbytes,
            figures=self.figures,
            server_share=answers[1] / answers[0] if len(answers) > 1 else None,
        )

    def engine_alone(self) -> None:
        """Measure the first load and everything that requires no server, then free the model."""
        self.on_phase("first load; kernels that are not cached are compiled")
        seconds, loaded = self._load()
        self._add("load", self.bandwidth.load("first", [seconds], self.file_bytes))
        self._prompts = timing.Prompts(loaded.tokenizer.vocab.size)
        self._timed(loaded.engine, self.sizes.first, self.sizes.answer)  # warm-up
        self._decode_and_prefill(loaded.engine)
        self._samplers(loaded.engine)
        self.on_phase("first tokens and long answers")
        first = [self._timed(loaded.engine, self.sizes.first, 1)[0] for _ in range(self.sizes.first_tokens)]
        answer = partial(self._timed, loaded.engine, self.sizes.first, self.sizes.answer)
        self._add_first_tokens_and_answers("engine", first, timing.repeated(answer, RUNS, 0))

    def throughput(self) -> None:
        """Measure decode of 1, 8, … sequences at once, up to `engine.max_running`."""
        limit = self.settings.engine.max_running
        for count in (*(n for n in _AT_ONCE if n < limit), limit):
            self.on_phase(f"decode of {count} sequences at once")
            gc.collect()
            self._add("throughput", self._at_once(count))

    def loads(self) -> None:
        """Measure loads with the file and the kernels in their caches."""
        self.on_phase("loading again")
        seconds = []
        for _ in range(RUNS):
            gc.collect()
            seconds.append(self._load()[0])
        gc.collect()
        self._add("load", self.bandwidth.load("again", seconds, self.file_bytes))

    def behind_a_server(self, url: str) -> None:
        """Measure starts of `worker run` processes, and jobs served by one."""
        sizes, model = self.sizes, self.settings.model
        options = ["--context", str(model.context)] if model.context else []
        options += ["--backend", self.settings.engine.backend]
        self.on_phase("starting worker processes")
        starts = [timing.timed_start(self.path, url, options) for _ in range(sizes.starts)]
        self._add("start", self.bandwidth.load("ready", starts, self.file_bytes))
        self.on_phase("a worker process behind a server")
        jobs = timing.Jobs(sizes.first, sizes.first_tokens, RUNS, sizes.answer)
        gc.collect()
        gc.freeze()  # this process is the client: keep the garbage collector out of its timings
        try:
            first, answers = timing.timed_jobs(self.path, url, options, jobs, self._prompts.next)
        finally:
            gc.unfreeze()
        self._add_first_tokens_and_answers("server", first, answers)

    def _at_once(self, count: int) -> Figure:
        """Load the model with `count` slots and measure decode of as many sequences."""
        sizes, engine = self.sizes, self._load(max_running=count)[1].engine

        def run() -> timing.Together:
            return timing.together(engine, [self._prompts.next(sizes.first) for _ in range(count)], sizes.together)

        run()  # captures graphs
        runs = timing.repeated(run, _THROUGHPUT_RUNS, sizes.budget_s)
        context = round(statistics.median(run.context for run in runs))
        moved, rate = self.traffic.step_bytes(count, context), 1e9 * self.bandwidth.gb_s
        floor = count / self.traffic.step_floor_s(count, context, rate, self._operations_per_s(_INT8_OPERATIONS_PER_S))
        return self.bandwidth.speed(count, [run.step_s for run in runs], moved, count, floor=floor, context=context)

    def _decode_and_prefill(self, engine: Engine) -> None:
        traffic, bandwidth, tokens = self.traffic, self.bandwidth, self.sizes.tokens
        for length in self.sizes.lengths:
            self.on_phase(f"decode and prefill at {length:,} tokens")
            runs = timing.repeated(partial(self._timed, engine, length, tokens), RUNS, self.sizes.budget_s)
            first, a_token = ([run[i] for run in runs] for i in (0, 1))
            moved = traffic.token_bytes(length + tokens // 2)  # the keys that the middle token attends to
            self._add("decode", bandwidth.speed(length, a_token, moved, limit=1e9 * bandwidth.gb_s / moved))
            floor_s = traffic.prompt_floor_s(
                length, 1e9 * bandwidth.gb_s, self._operations_per_s(_F16_OPERATIONS_PER_S)
            )
            prefill = bandwidth.speed(length, first, traffic.prompt_bytes(length), length, limit=length / floor_s)
            self._add("prefill", replace(prefill, tflops=prefill.median / length * traffic.prompt_flops(length) / 1e12))

    def _samplers(self, engine: Engine) -> None:
        self.on_phase("sampling settings")
        first, tokens = self.sizes.first, self.sizes.tokens
        moved = self.traffic.token_bytes(first + tokens // 2)
        times = timing.samplers(engine, self._prompts, first, tokens, RUNS)
        for name, seconds in times.items():
            extra_us = 1e6 * statistics.median(a - b for a, b in zip(seconds, times["greedy"], strict=True))
            self._add("sampler", self.bandwidth.speed(name, seconds, moved, extra_us=extra_us))

    def _timed(self, engine: Engine, prompt: int, tokens: int) -> timing.Timed:
        return timing.timed(engine, self._prompts.next(prompt), tokens)

    def _load(self, max_running: int = 1) -> tuple[float, runtime.LoadedModel]:
        """Load the model, by default for one sequence at a time; returns also the seconds."""
        engine = self.settings.engine.model_copy(update={"max_running": max_running})
        began = time.perf_counter()
        loaded = runtime.load(self.path, self.settings.model, engine)
        seconds, planned = time.perf_counter() - began, self.traffic.planned
        self.model = self.model or ModelFacts(
            name=loaded.name,
            file=self.path.name,
            fingerprint=loaded.fingerprint,
            architecture=planned.hparams.architecture,
            context=loaded.engine.context,
            file_bytes=self.file_bytes,
            weight_bytes=planned.weight_bytes,
            kv_bytes_per_token=planned.kv_bytes_per_token,
        )
        return seconds, loaded

    def _add_first_tokens_and_answers(self, at: str, first: list[float], answers: list[timing.Timed]) -> None:
        sizes, traffic = self.sizes, self.traffic
        self._add("first_token", self.bandwidth.first_tokens(at, first, traffic.prompt_bytes(sizes.first)))
        moved = traffic.token_bytes(sizes.first + sizes.answer // 2)
        self._add("answer", self.bandwidth.speed(at, [a_token for _, a_token in answers], moved))

    def _operations_per_s(self, rates: Mapping[str, float]) -> float:
        """The device's rate; infinite if unknown."""
        return next((rate for card, rate in rates.items() if card in self.backend.device), math.inf)

    def _add(self, name: str, figure: Figure) -> None:
        self.figures.setdefault(name, []).append(figure)


def _machine(backend: Backend) -> Machine:
    cuda = cupy = driver = None
    if backend.name == "gpu":
        from worker.gpu.bandwidth import versions  # noqa: PLC0415  # CuPy is only needed on a GPU

        cuda, cupy = versions()
        driver = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return Machine(
        device=backend.device,
        backend=backend.name,
        cores=len(os.sched_getaffinity(0)),
        driver=driver,
        cuda=cuda,
        cupy=cupy,
        numpy=np.__version__,
        python=platform.python_version(),
    )


def _read_bandwidth(backend: Backend, engine: EngineSection, nbytes: int) -> Bandwidth:
    """Time reads of `nbytes`, on a GPU at most half the free memory. Raises VramOom."""
    if backend.name == "gpu":
        from worker.gpu import bandwidth as gpu  # noqa: PLC0415  # as above

        return Bandwidth(*gpu.read_seconds(engine.kernel_cache, min(nbytes, backend.available_bytes() // 2), RUNS))
    from worker.cpu import threads as cpu  # noqa: PLC0415  # as above

    return Bandwidth(*cpu.read_seconds(nbytes, RUNS))


def checkout_commit() -> str | None:
    """Return the commit of the checkout of this file; None if it is an installed package."""
    git, here = ("git", "-C", str(Path(__file__).parent)), Path(__file__).name
    if _first_line(*git, "ls-files", "--error-unmatch", here) is None:
        return None
    return _first_line(*git, "describe", "--always", "--dirty", "--exclude=*")


def _first_line(*command: str) -> str | None:
    """Return the first line of a command's output; None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip()
