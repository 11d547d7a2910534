"""The measurements of one `worker bench` run, in order.

Read bandwidth, the engine alone, repeated loads, then the model behind a server: the worker process
comes last and has the device to itself. `traffic.py` defines the bytes, `timing.py` the timings.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
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
from worker.errors import ConfigInvalid
from worker.gguf_file import GgufFile

RUNS = 5
_AT_ONCE = (1, 8, 32, 64, 128, 256)
_THROUGHPUT_RUNS = 3


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
    together: int = 8
    """Tokens of each of several sequences that generate at once, after prompts of `first`."""
    budget_s: float = 0.3
    """More than RUNS runs if they fit into this time."""

    def within(self, context: int) -> Sizes:
        """Return the sizes that fit the context. Raises ConfigInvalid if too few fit."""
        required = max(self.first + self.answer, min(self.lengths) + self.tokens)
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
        with GgufFile.open(path) as file:
            file_bytes, backend = file.tensor_bytes, runtime.open_backend(settings.engine)
            planned = runtime.plan(
                file, settings.model, backend, settings.engine.kv_memory, settings.engine.max_running
            )
        sizes = SIZES[backend.name].within(planned.context)
        on_phase("read bandwidth")
        bandwidth = _read_bandwidth(backend, settings.engine, sizes.read_bytes)
        bench = Bench(path, settings, sizes, Traffic(planned, backend.weight_bytes), bandwidth, file_bytes, on_phase)
        facts = bench.engine_alone()
        bench.throughput()
        bench.loads()
        bench.behind_a_server(url)
    alone, served = (figure.median for figure in bench.figures["answer"])
    return Result(
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        version=__version__,
        commit=_commit(),
        machine=_machine(backend),
        model=facts,
        bandwidth_gb_s=bandwidth.gb_s,
        bandwidth_low=bandwidth.nbytes / max(bandwidth.seconds) / 1e9,
        bandwidth_high=bandwidth.nbytes / min(bandwidth.seconds) / 1e9,
        bandwidth_bytes=bandwidth.nbytes,
        server_share=served / alone,
        figures=bench.figures,
    )


@dataclass
class Bench:
    """The measurements of one model: each method adds to `figures`, those of the Result."""

    path: Path
    settings: Settings
    sizes: Sizes
    traffic: Traffic
    bandwidth: Bandwidth
    file_bytes: int
    on_phase: Callable[[str], None]
    figures: dict[str, list[Figure]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._prompts = timing.Prompts(self.traffic.planned.hparams.vocab_size)

    def engine_alone(self) -> ModelFacts:
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
        planned = self.traffic.planned
        return ModelFacts(
            name=loaded.name,
            file=self.path.name,
            fingerprint=loaded.fingerprint,
            architecture=planned.hparams.architecture,
            context=loaded.engine.context,
            file_bytes=self.file_bytes,
            weight_bytes=planned.weight_bytes,
            kv_bytes_per_token=planned.kv_bytes_per_token,
        )

    def throughput(self) -> None:
        """Measure decode of 1, 8, … sequences at once, up to `engine.max_running` if above 1."""
        limit, sizes = self.settings.engine.max_running, self.sizes
        for count in sorted({*(n for n in _AT_ONCE if n < limit), limit} if limit > 1 else ()):
            self.on_phase(f"decode of {count} sequences at once")
            gc.collect()
            engine = self.settings.engine.model_copy(update={"max_running": count})
            loaded = runtime.load(self.path, self.settings.model, engine)
            runs = []
            for _ in range(1 + _THROUGHPUT_RUNS):  # the first run captures graphs
                prompts = [self._prompts.next(sizes.first) for _ in range(count)]
                runs.append(timing.together(loaded.engine, prompts, sizes.together))
            moved = self.traffic.step_bytes(count, sizes.first + sizes.together // 2)
            limit_s = moved / (1e9 * self.bandwidth.gb_s)
            self._add("throughput", self.bandwidth.speed(count, runs[1:], moved, count, limit=count / limit_s))
            del loaded

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
        """Measure first tokens and answers of jobs served by a `worker run` process."""
        sizes, model = self.sizes, self.settings.model
        self.on_phase("a worker process behind a server")
        options = ["--context", str(model.context)] if model.context else []
        options += ["--backend", self.settings.engine.backend]
        jobs = timing.Jobs(sizes.first, sizes.first_tokens, RUNS, sizes.answer)
        gc.collect()
        gc.freeze()  # this process is the client: keep the garbage collector out of its timings
        try:
            first, answers = timing.timed_jobs(self.path, url, options, jobs, self._prompts.next)
        finally:
            gc.unfreeze()
        self._add_first_tokens_and_answers("server", first, answers)

    def _decode_and_prefill(self, engine: Engine) -> None:
        traffic, bandwidth, tokens = self.traffic, self.bandwidth, self.sizes.tokens
        for length in self.sizes.lengths:
            self.on_phase(f"decode and prefill at {length:,} tokens")
            runs = timing.repeated(partial(self._timed, engine, length, tokens), RUNS, self.sizes.budget_s)
            first, a_token = ([run[i] for run in runs] for i in (0, 1))
            moved = traffic.token_bytes(length + tokens // 2)  # the keys that the middle token attends to
            self._add("decode", bandwidth.speed(length, a_token, moved, limit=1e9 * bandwidth.gb_s / moved))
            prefill = bandwidth.speed(length, first, traffic.prompt_bytes(length), length)
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

    def _load(self) -> tuple[float, runtime.LoadedModel]:
        began = time.perf_counter()
        loaded = runtime.load(self.path, self.settings.model, self.settings.engine)
        return time.perf_counter() - began, loaded

    def _add_first_tokens_and_answers(self, at: str, first: list[float], answers: list[timing.Timed]) -> None:
        sizes, traffic = self.sizes, self.traffic
        self._add("first_token", self.bandwidth.first_tokens(at, first, traffic.prompt_bytes(sizes.first)))
        moved = traffic.token_bytes(sizes.first + sizes.answer // 2)
        self._add("answer", self.bandwidth.speed(at, [a_token for _, a_token in answers], moved))

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


def _commit() -> str | None:
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
