"""Tokens/s of an engine alone, on the load that `concurrent_streams` sends through a server.

    python -m benchmarks.engine_rate MODEL.gguf [--streams 64] [--seconds 4]

As many sequences run at all times: one that ends is replaced by another with a new random prompt.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

from benchmarks.stream_load import text_ids
from worker.config import load_settings
from worker.engine import DrawnToken, Engine, Sequence
from worker.runtime import load
from worker.sampling import Sampling


@dataclass(frozen=True)
class EngineRate:
    """What the engine alone does with a load."""

    tokens_per_s: float
    step_ms: float
    """Median of the steps before which no sequence was added."""
    vocab_size: int


def sequences(ids: range, prompt_tokens: int, tokens: tuple[int, int]) -> Iterator[Sequence]:
    """Greedy sequences with random prompts and lengths; they never end."""
    rng = random.Random(1)
    for number in count():
        prompt = rng.choices(ids, k=prompt_tokens)
        yield Sequence(str(number), prompt, rng.randint(*tokens), Sampling(temperature=0.0, ignore_eos=True))


def measure(
    engine: Engine, streams: int, load: Iterator[Sequence], warm_s: float, seconds: float
) -> tuple[float, float]:
    """Run `streams` sequences at a time; tokens/s after `warm_s`, and the median step in s."""
    for _ in range(streams):
        engine.add(next(load))
    began = time.monotonic() + warm_s
    drawn, plain = 0, list[float]()
    at, ended = time.monotonic(), 1
    while at < began + seconds:
        tokens = engine.step()
        before, at = at, time.monotonic()
        if before >= began:
            drawn += len(tokens)
            if not ended:
                plain.append(at - before)
        ended = sum(not isinstance(token, DrawnToken) or token.finish is not None for token in tokens)
        for _ in range(ended):
            engine.add(next(load))
    plain.sort()
    return drawn / (at - began), plain[len(plain) // 2] if plain else 0.0


def main() -> None:
    """Parse the arguments, load the model, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, nargs=2, default=(256, 768))
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--warm-up", type=float, default=2.0)
    parser.add_argument("--seconds", type=float, default=4.0)
    arguments = parser.parse_args()
    settings = load_settings(flags={"engine.max_running": arguments.streams, "model.context": arguments.context})
    model = load(arguments.model, settings.model, settings.engine)
    jobs = sequences(text_ids(model.vocab_size), arguments.prompt, tuple(arguments.tokens))
    rate, step_s = measure(model.engine, arguments.streams, jobs, arguments.warm_up, arguments.seconds)
    print(json.dumps(asdict(EngineRate(rate, 1000 * step_s, model.vocab_size))))


if __name__ == "__main__":
    main()
