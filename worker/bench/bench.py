"""The measurements of one `worker bench` run, in order.

Read bandwidth, the engine alone, repeated loads, then the model behind a server: the worker process
comes last and has the device to itself. `traffic.py` defines the bytes moved.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from worker import __version__, runtime
from worker.bench.machine import commit, machine_of, read_bandwidth
from worker.bench.result import Bandwidth, Figure, ModelFacts, Result
from worker.bench.timing import (
    SAMPLINGS,
    Jobs,
    Prompts,
    Timed,
    beyond_greedy_us,
    repeated,
    samplers,
    timed,
    timed_jobs,
)
from worker.bench.traffic import Traffic
from worker.config import Settings
from worker.embedded import embedded_server
from worker.engine import Engine
from worker.errors import ConfigInvalid
from worker.gguf_file import GgufFile

RUNS = 5
OnPhase = Callable[[str], None]
"""Called with the name of each measurement before it starts."""


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
    budget_s: float = 0.3
    """More than RUNS runs if they fit into this time."""

    def within(self, context: int) -> Sizes:
        """Return the sizes that fit the context. Raises ConfigInvalid if too few fit."""
        required = max(self.first + self.answer, min(self.lengths) + self.tokens)
        if required > context:
            raise ConfigInvalid(f"a context of {context} tokens is too short; pass at least {required}")
        return replace(self, lengths=tuple(n for n in self.lengths if n + self.tokens <= context))


SIZES = {
    "gpu": Sizes(4 << 30, (128, 512, 1024, 2048, 3500, 8192), tokens=48, first=128, answer=256),
    "cpu": Sizes(512 << 20, (32, 128, 512), tokens=8, first=32, answer=32),
}


def run(path: Path, settings: Settings, on_phase: OnPhase) -> Result:
    """Measure the model of a file as `worker run` would serve it under these settings.

    Raises what loading raises; ConfigInvalid where there is no server to embed or the context is
    too short; Internal where the worker process fails.
    """
    with embedded_server() as url:
        with GgufFile.open(path) as file:
            file_bytes, backend = file.tensor_bytes, runtime.open_backend(settings.engine)
            planned = runtime.plan(file, settings.model, backend, settings.engine.kv_memory)
        sizes = SIZES[backend.name].within(planned.context)
        on_phase("read bandwidth")
        bandwidth = read_bandwidth(backend, settings.engine, sizes.read_bytes, RUNS)
        bench = Bench(path, settings, sizes, Traffic(planned, backend.weight_bytes), bandwidth, on_phase)
        facts = bench.engine_alone(file_bytes)
        bench.loads(file_bytes)
        bench.behind_a_server(url)
    alone, served = (figure.median for figure in bench.figures["answer"])
    rates = [bandwidth.nbytes / seconds / 1e9 for seconds in bandwidth.seconds]
    return Result(
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        version=__version__,
        commit=commit(),
        machine=machine_of(backend),
        model=facts,
        bandwidth_gb_s=bandwidth.gb_s,
        bandwidth_low=min(rates),
        bandwidth_high=max(rates),
        bandwidth_bytes=bandwidth.nbytes,
        server_share=served / alone,
        figures=bench.figures,
    )


class Bench:
    """The measurements of one model: each method adds to `figures`, those of the Result."""

    def __init__(
        self, path: Path, settings: Settings, sizes: Sizes, traffic: Traffic, bandwidth: Bandwidth, on_phase: OnPhase
    ) -> None:
        self.figures: dict[str, list[Figure]] = {}
        self._path = path
        self._settings = settings
        self._sizes = sizes
        self._traffic = traffic
        self._bandwidth = bandwidth
        self._on_phase = on_phase
        self._prompts = Prompts(traffic.planned.hparams.vocab_size)

    def engine_alone(self, file_bytes: int) -> ModelFacts:
        """Everything that needs no server, and the first load.

        What was loaded is gone afterwards.
        """
        self._on_phase("first load; kernels that are not cached are compiled")
        seconds, loaded = self._load()
        self._add("load", self._bandwidth.time("first", "s", [seconds], file_bytes))
        self._prompts = Prompts(loaded.tokenizer.vocab.size)
        self._timed(loaded.engine, self._sizes.first, self._sizes.answer)  # warm-up
        self._decode_and_prefill(loaded.engine)
        self._samplers(loaded.engine)
        self._first_token_and_answer(loaded.engine)
        planned = self._traffic.planned
        return ModelFacts(
            name=loaded.name,
            file=self._path.name,
            fingerprint=loaded.fingerprint,
            architecture=planned.hparams.architecture,
            context=loaded.engine.context,
            file_bytes=file_bytes,
            weight_bytes=planned.weight_bytes,
            kv_bytes_per_token=planned.kv_bytes_per_token,
        )

    def loads(self, file_bytes: int) -> None:
        """From the file's opening to a ready engine.

        File and kernels are in their caches by now.
        """
        self._on_phase("loading again")
        seconds = []
        for _ in range(RUNS):
            gc.collect()
            seconds.append(self._load()[0])
        gc.collect()
        self._add("load", self._bandwidth.time("again", "s", seconds, file_bytes))

    def behind_a_server(self, url: str) -> None:
        """Measure first tokens and answers of jobs served by a `worker run` process."""
        sizes, model = self._sizes, self._settings.model
        self._on_phase("a worker process behind a server")
        options = ["--context", str(model.context)] if model.context else []
        options += ["--backend", self._settings.engine.backend]
        jobs = Jobs(sizes.first, sizes.first_tokens, RUNS, sizes.answer)
        gc.collect()
        gc.freeze()  # this process is the client: keep the garbage collector out of its timings
        try:
            first, answers = timed_jobs(self._path, url, options, jobs, self._prompts.next)
        finally:
            gc.unfreeze()
        self._add("first_token", self._bandwidth.first_tokens("server", first, self._first_bytes))
        self._add("answer", self._bandwidth.speed("server", [a_token for _, a_token in answers], self._answer_bytes))

    def _decode_and_prefill(self, engine: Engine) -> None:
        traffic, bandwidth, tokens = self._traffic, self._bandwidth, self._sizes.tokens
        for length in self._sizes.lengths:
            self._on_phase(f"decode and prefill at {length:,} tokens")
            runs = repeated(partial(self._timed, engine, length, tokens), RUNS, self._sizes.budget_s)
            first, a_token = ([run[i] for run in runs] for i in (0, 1))
            moved = traffic.token_bytes(length + tokens // 2)  # the keys that the middle token attends to
            self._add("decode", bandwidth.speed(length, a_token, moved, limit=1e9 * bandwidth.gb_s / moved))
            prefill = bandwidth.speed(length, first, traffic.prompt_bytes(length), length)
            self._add("prefill", replace(prefill, tflops=prefill.median / length * traffic.prompt_flops(length) / 1e12))

    def _samplers(self, engine: Engine) -> None:
        self._on_phase("sampling settings")
        first, tokens = self._sizes.first, self._sizes.tokens
        seconds = samplers(engine, self._prompts, first, tokens, RUNS)
        moved = self._traffic.token_bytes(first + tokens // 2)
        for name in SAMPLINGS:
            extra = beyond_greedy_us(seconds, name)
            self._add("sampler", self._bandwidth.speed(name, seconds[name], moved, extra_us=extra))

    def _first_token_and_answer(self, engine: Engine) -> None:
        sizes = self._sizes
        self._on_phase("first tokens and long answers")
        first = [self._timed(engine, sizes.first, 1)[0] for _ in range(sizes.first_tokens)]
        answers = repeated(partial(self._timed, engine, sizes.first, sizes.answer), RUNS, 0)
        self._add("first_token", self._bandwidth.first_tokens("engine", first, self._first_bytes))
        self._add("answer", self._bandwidth.speed("engine", [a_token for _, a_token in answers], self._answer_bytes))

    def _timed(self, engine: Engine, prompt: int, tokens: int) -> Timed:
        return timed(engine, self._prompts.next(prompt), tokens)

    @property
    def _first_bytes(self) -> int:
        return self._traffic.prompt_bytes(self._sizes.first)

    @property
    def _answer_bytes(self) -> int:
        return self._traffic.token_bytes(self._sizes.first + self._sizes.answer // 2)

    def _load(self) -> tuple[float, runtime.LoadedModel]:
        began = time.perf_counter()
        loaded = runtime.load(self._path, self._settings.model, self._settings.engine)
        return time.perf_counter() - began, loaded

    def _add(self, name: str, figure: Figure) -> None:
        self.figures.setdefault(name, []).append(figure)
