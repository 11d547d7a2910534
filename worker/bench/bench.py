"""One run of `worker bench`, from top to bottom: bandwidth, the engine alone, loads, the same model behind a server.

What counts as moved is `traffic.py`'s. The worker process comes last and has the device to itself.
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
from worker.bench import server
from worker.bench.engine import SAMPLINGS, Prompts, Timed, beyond_greedy_us, repeated, samplers, timed
from worker.bench.machine import commit, machine_of, read_bandwidth
from worker.bench.result import Bandwidth, Figure, ModelFacts, Result
from worker.bench.traffic import Traffic
from worker.config import Settings
from worker.embedded import embedded_server
from worker.engine import Engine
from worker.errors import ConfigInvalid
from worker.gguf_file import GgufFile

RUNS = 5
Say = Callable[[str], None]
"""Hears what is measured next."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured; lengths are in tokens."""

    read_bytes: int
    lengths: tuple[int, ...]
    """Of prompts, and of the context that is decoded at."""
    tokens: int
    """Decoded at each length."""
    first: int
    """The prompt whose first token is timed, `first_tokens` times each way."""
    answer: int
    """Tokens of the answers that are compared with and without a server."""
    first_tokens: int = 40
    budget_s: float = 0.3
    """More than RUNS runs where they fit in."""

    def within(self, context: int) -> Sizes:
        """What a context has room for. Raises ConfigInvalid where that is too little."""
        least = max(self.first + self.answer, min(self.lengths) + self.tokens)
        if least > context:
            raise ConfigInvalid(f"a context of {context} tokens is too short to measure; at least {least} are needed")
        return replace(self, lengths=tuple(n for n in self.lengths if n + self.tokens <= context))


SIZES = {
    "gpu": Sizes(4 << 30, (128, 512, 1024, 2048, 3500, 8192), tokens=48, first=128, answer=256),
    "cpu": Sizes(512 << 20, (32, 128, 512), tokens=8, first=32, answer=32),
}


def run(path: Path, settings: Settings, say: Say) -> Result:
    """Measure the model of a file as `worker run` would serve it under these settings.

    Raises what loading raises; ConfigInvalid where there is no server to embed or the context is too short; Internal
    where the worker process fails.
    """
    with embedded_server() as url:
        with GgufFile.open(path) as file:
            file_bytes, backend = file.tensor_bytes, runtime.open_backend(settings.engine)
            planned = runtime.plan(file, settings.model, backend, settings.engine.kv_memory)
        sizes = SIZES[backend.name].within(planned.context)
        say("how fast the device reads")
        bandwidth = read_bandwidth(backend, settings.engine, sizes.read_bytes, RUNS)
        bench = Bench(path, settings, sizes, Traffic(planned, backend.weight_bytes), bandwidth, say)
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
    """One model under measurement: each method fills lists of `figures`, which are a Result's."""

    def __init__(
        self, path: Path, settings: Settings, sizes: Sizes, traffic: Traffic, bandwidth: Bandwidth, say: Say
    ) -> None:
        self.figures: dict[str, list[Figure]] = {}
        self._path = path
        self._settings = settings
        self._sizes = sizes
        self._traffic = traffic
        self._bandwidth = bandwidth
        self._say = say
        self._prompts = Prompts(traffic.planned.hparams.vocab_size)

    def engine_alone(self, file_bytes: int) -> ModelFacts:
        """Everything that needs no server, and the first load; what was loaded is gone afterwards."""
        self._say("loading; kernels compile where no cache has them")
        seconds, loaded = self._load()
        self._add("load", self._bandwidth.time("first", "s", [seconds], file_bytes))
        self._prompts = Prompts(loaded.tokenizer.vocab.size)
        self._timed(loaded.engine, self._sizes.first, self._sizes.answer)  # warms up
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
        """From the file's opening to a ready engine; file and kernels are in their caches by now."""
        self._say("loading again")
        seconds = []
        for _ in range(RUNS):
            gc.collect()
            seconds.append(self._load()[0])
        gc.collect()
        self._add("load", self._bandwidth.time("again", "s", seconds, file_bytes))

    def behind_a_server(self, url: str) -> None:
        """First tokens and answers of jobs that a `worker run` process takes from a queue."""
        sizes, model = self._sizes, self._settings.model
        self._say("a worker process behind a server")
        options = ["--context", str(model.context)] if model.context else []
        options += ["--backend", self._settings.engine.backend]
        jobs = server.Jobs(sizes.first, sizes.first_tokens, RUNS, sizes.answer)
        gc.collect()
        gc.freeze()  # this process is the reader: no collection walks through all that it has measured meanwhile
        try:
            first, answers = server.measure(self._path, url, options, jobs, self._prompts.next)
        finally:
            gc.unfreeze()
        self._add("first_token", self._bandwidth.first_tokens("server", first, self._first_bytes))
        self._add("answer", self._bandwidth.speed("server", [a_token for _, a_token in answers], self._answer_bytes))

    def _decode_and_prefill(self, engine: Engine) -> None:
        traffic, bandwidth, tokens = self._traffic, self._bandwidth, self._sizes.tokens
        for length in self._sizes.lengths:
            self._say(f"decode and prefill at {length:,} tokens")
            runs = repeated(partial(self._timed, engine, length, tokens), RUNS, self._sizes.budget_s)
            first, a_token = ([run[i] for run in runs] for i in (0, 1))
            moved = traffic.token_bytes(length + tokens // 2)  # the keys that the middle token attends to
            self._add("decode", bandwidth.speed(length, a_token, moved, limit=1e9 * bandwidth.gb_s / moved))
            prefill = bandwidth.speed(length, first, traffic.prompt_bytes(length), length)
            self._add("prefill", replace(prefill, tflops=prefill.median / length * traffic.prompt_flops(length) / 1e12))

    def _samplers(self, engine: Engine) -> None:
        self._say("ways of drawing")
        first, tokens = self._sizes.first, self._sizes.tokens
        seconds = samplers(engine, self._prompts, first, tokens, RUNS)
        moved = self._traffic.token_bytes(first + tokens // 2)
        for name in SAMPLINGS:
            extra = beyond_greedy_us(seconds, name)
            self._add("sampler", self._bandwidth.speed(name, seconds[name], moved, extra_us=extra))

    def _first_token_and_answer(self, engine: Engine) -> None:
        sizes = self._sizes
        self._say("first tokens and long answers")
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
