"""Tokens/s and first tokens with and without a JSON Schema.

    python -m benchmarks.structured MODEL.gguf [--streams 1 8 32] [--tokens 384] [--turns 3]
    python -m benchmarks.structured MODEL.gguf --server [--tokens 384]

Of an engine alone: one line a number of sequences, with all of them free, all with the schema, and
one with the schema among free ones, in turn, each the median of the turns. Then the cost of the
first token, with a schema that is compiled for it, and the host's time for a mask. With --server:
jobs one after another through a Redis server and a worker, free and with a schema in turn, by the
figures of the worker. The schema's answer does not end within the tokens of a measurement.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.concurrent_streams import run_with_worker, wait_for_worker
from benchmarks.stream_load import text_ids
from worker.config import load_settings
from worker.engine import DrawnToken, Engine
from worker.engine import Sequence as Job
from worker.jobs.client import Client
from worker.jobs.events import End
from worker.runtime import LoadedModel, load
from worker.sampling import Grammar, Sampling, TokenMask
from worker.text.grammar import GrammarSource
from worker.text.json_schema import prepare, schema_source
from worker.text.lark import OPTIONS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from worker.embedded import Child

PROMPT = 128
FIRST_TOKENS = 10
"""First tokens that are measured, each with a schema of its own."""
_PROPERTIES = 40


def schema(title: str) -> dict[str, Any]:
    """A schema of about 5 KB for an answer without an end in sight."""
    kinds: Sequence[dict[str, Any]] = (
        {"type": "string", "maxLength": 40, "description": "A name of at most 40 characters."},
        {"type": "integer", "minimum": 0, "maximum": 100_000},
        {"enum": ["red", "green", "blue", "yellow", "a longer alternative"]},
        {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 5},
        {"type": ["boolean", "null"], "description": "Whether it applies, if that is known."},
        {"type": "object", "properties": {"from": {"type": "string"}, "to": {"type": "integer"}}, "required": ["to"]},
    )
    properties = {f"property_{number}": kinds[number % len(kinds)] for number in range(_PROPERTIES)}
    record = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"title": title, "type": "array", "items": record, "minItems": 1000}


@dataclass
class TimedGrammar:
    """A grammar whose masks record the seconds of their calls."""

    grammar: Grammar
    fills: list[float] = field(default_factory=list)
    accepts: list[float] = field(default_factory=list)

    def start(self) -> TokenMask:
        """See `Grammar.start`."""
        return _TimedMask(self, self.grammar.start())


class _TimedMask:
    def __init__(self, timed: TimedGrammar, mask: TokenMask) -> None:
        self._timed, self._mask = timed, mask

    def accept(self, token_id: int) -> None:
        began = time.perf_counter()
        self._mask.accept(token_id)
        self._timed.accepts.append(time.perf_counter() - began)

    def fill(self, mask: NDArray[np.uint32]) -> None:
        began = time.perf_counter()
        self._mask.fill(mask)
        self._timed.fills.append(time.perf_counter() - began)


@dataclass(frozen=True)
class Rates:
    """Tokens/s of all sequences together, by the number of sequences."""

    streams: int
    free: float
    masked: float
    """All sequences have the schema."""
    mixed: float
    """One sequence has the schema."""
    mask: str
    """The host's time for a mask."""

    def __str__(self) -> str:
        masked, mixed = (f"{rate:9,.0f} ({100 * rate / self.free:5.1f} %)" for rate in (self.masked, self.mixed))
        free = f"N {self.streams:>3}  free {self.free:9,.0f} tokens/s"
        return f"{free}  schema {masked}  one with schema {mixed}  a mask {self.mask}"


@dataclass(frozen=True)
class FirstTokens:
    """Medians in ms."""

    tokenizer: float
    """Once a model."""
    schema_bytes: int
    compile: float
    free: float
    masked: float

    def __str__(self) -> str:
        return (
            f"first token: free {self.free:.2f} ms, schema of {self.schema_bytes:,} bytes {self.masked:.2f} ms"
            f" and {self.compile:.2f} ms to compile; the library's tokenizer, once a model, {self.tokenizer:.0f} ms"
        )


class Bench:
    """A loaded model, and sequences with random prompts."""

    def __init__(self, path: Path, streams: int, temperature: float) -> None:
        flags = {"engine.max_running": streams, "model.context": 2048, "engine.prefix_cache": False}
        settings = load_settings(flags=flags)
        self.model: LoadedModel = load(path, settings.model, settings.engine)
        self.engine: Engine = self.model.engine
        self._temperature = temperature
        self._rng = random.Random(1)
        self._count = 0

    def compiled(self, title: str) -> TimedGrammar:
        """The compiled schema with this title."""
        prepared, errors = prepare(schema(title), "schema")
        assert not errors, errors
        source = GrammarSource(f"{OPTIONS}\nstart: {schema_source(prepared)}\n", "schema")
        return TimedGrammar(self.model.tokenizer.grammars.compile(source))

    def job(self, tokens: int, grammar: Grammar | None) -> Job:
        """A sequence that draws `tokens` tokens."""
        self._count += 1
        sampling = Sampling(
            temperature=self._temperature, seed=self._count, ignore_eos=grammar is None, grammar=grammar
        )
        return Job(str(self._count), self._rng.choices(text_ids(self.model.vocab_size), k=PROMPT), tokens, sampling)

    def rate(self, grammars: Sequence[Grammar | None], tokens: int) -> float:
        """Tokens/s of sequences with these grammars, from the step after all first tokens."""
        missing = set()
        for grammar in grammars:
            job = self.job(tokens, grammar)
            missing.add(job.id)
            self.engine.add(job)
        drawn, began = 0, 0.0
        while not self.engine.idle:
            found = self.engine.step()
            if not missing:
                drawn += len(found)
                if any(not isinstance(each, DrawnToken) or each.finish for each in found):
                    break
                continue
            missing -= {each.sequence_id for each in found}
            began = time.perf_counter()
        rate = drawn / (time.perf_counter() - began)
        for name in self.engine.active:
            self.engine.abort(name)
        return rate

    def first_token(self, grammar: Grammar | None) -> float:
        """Milliseconds from `add` to the first token."""
        job = self.job(4, grammar)
        began = time.perf_counter()
        self.engine.add(job)
        while not self.engine.step():
            pass
        elapsed = time.perf_counter() - began
        self.engine.abort(job.id)
        return 1000 * elapsed


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds of a call, and its result."""
    began = time.perf_counter()
    result = function()
    return 1000 * (time.perf_counter() - began), result


def rates(bench: Bench, streams: int, grammar: TimedGrammar, tokens: int, turns: int) -> Rates:
    """The medians of `turns` turns, after one that is not counted."""
    loads = ([None] * streams, [grammar] * streams, [grammar, *[None] * (streams - 1)])
    grammar.fills.clear()
    measured = [[bench.rate(load, tokens) for load in loads] for _ in range(turns + 1)][1:]
    free, masked, mixed = (statistics.median(column) for column in zip(*measured, strict=True))
    return Rates(streams, free, masked, mixed, microseconds(grammar.fills))


def first_tokens(bench: Bench, tokenizer_ms: float) -> FirstTokens:
    """The medians of FIRST_TOKENS first tokens of either kind, in turn."""
    bench.first_token(None)
    compiles, free, masked = [], [], []
    for number in range(FIRST_TOKENS):
        free.append(bench.first_token(None))
        compile_ms, grammar = timed(partial(bench.compiled, f"schema {number}"))
        compiles.append(compile_ms)
        masked.append(bench.first_token(grammar))
    size = len(json.dumps(schema("schema 0")))
    return FirstTokens(tokenizer_ms, size, *map(statistics.median, (compiles, free, masked)))


async def through_server(url: str, worker: Child, tokens: int) -> str:
    """Medians of jobs one after another: free, with one schema, each with a schema of its own."""
    kinds = {"free": None, "one schema": "same", "a new schema each": "new"}
    ends: dict[str, list[End]] = {kind: [] for kind in kinds}
    async with Client.from_url(url) as client:
        await wait_for_worker(client, worker)
        for number in range(FIRST_TOKENS + 1):
            for kind, title in kinds.items():
                name = f"{kind} {number}".replace(" ", "-")
                prompt = f"{name} {'Describe each of the records in turn. ' * 12}"
                fields: dict[str, Any] = {"ignore_eos": True}
                if title is not None:
                    fields = {"response_format": format_of(title if title == "same" else name)}
                job_id = await client.submit(job_id=name, prompt=prompt, max_tokens=tokens, temperature=0.0, **fields)
                async for item in client.events(job_id):
                    if isinstance(item.event, End):
                        ends[kind].append(item.event)
    return "; ".join(f"{kind}: {_of_ends(ends[kind][1:])}" for kind in kinds)


def format_of(title: str) -> dict[str, Any]:
    """The `response_format` of a job."""
    return {"type": "json_schema", "json_schema": {"schema": schema(title)}}


def _of_ends(ends: Sequence[End]) -> str:
    rate = statistics.median(1000 * (end.tokens_out - 1) / end.decode_ms for end in ends)
    return f"{rate:,.0f} tokens/s, first token {statistics.median(end.ttft_ms for end in ends):.2f} ms"


def microseconds(seconds: list[float]) -> str:
    """Mean, median, 95th percentile and maximum."""
    ordered = sorted(seconds)
    median, late = (1e6 * ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.95))
    mean = 1e6 * statistics.mean(seconds)
    return f"{mean:.0f} µs (median {median:.0f}, p95 {late:.0f}, at most {1e6 * ordered[-1]:.0f})"


def main() -> None:
    """Parse the arguments, load the model, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=384)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--server", action="store_true", help="measure jobs through a server and a worker")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    chosen = parser.parse_args()
    if chosen.server:
        run_with_worker(
            ["worker", "run"],
            ["--model", str(chosen.model), "--context", "2048"],
            lambda url, worker: print(
                f"{chosen.model.stem:16} {asyncio.run(through_server(url, worker, chosen.tokens))}"
            ),
        )
        return
    bench = Bench(chosen.model, max(chosen.streams), chosen.temperature)
    tokenizer_ms, _ = timed(bench.model.tokenizer.grammars.prepare)
    grammar, lines = bench.compiled("rates"), []
    for streams in chosen.streams:
        lines.append(rates(bench, streams, grammar, chosen.tokens, chosen.turns))
        print(f"{chosen.model.stem:16} {lines[-1]}", flush=True)
    first = first_tokens(bench, tokenizer_ms)
    print(f"{chosen.model.stem:16} {first}")
    print(f"{chosen.model.stem:16} an accepted id {microseconds(grammar.accepts)}")
    if chosen.json is not None:
        chosen.json.write_text(json.dumps({"rates": list(map(asdict, lines)), "first_token": asdict(first)}) + "\n")


if __name__ == "__main__":
    main()
