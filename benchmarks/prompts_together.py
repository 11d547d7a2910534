"""First tokens of prompts that arrive at the same time.

    python -m benchmarks.prompts_together MODEL.gguf… [--load 64x100 --load 16x2048] [--answer 1]

Adds random prompts to an idle engine at once and runs it until each has its first token. Prints,
for each load, the prompt tokens/s up to the last first token, and the median and the 95th
percentile of the times to the first token. The reference is a load of one prompt of as many tokens
as the engine computes in a step (1x1024).
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import numpy as np

from benchmarks.stream_load import text_ids
from worker.config import load_settings
from worker.engine import DrawnToken, Engine, Sequence
from worker.runtime import load
from worker.sampling import Sampling

LOADS = ("1x128", "1x1024", "64x100", "32x64", "16x2048")


def first_tokens(engine: Engine, prompts: list[list[int]], answer: int) -> list[float]:
    """Seconds from the first `add` to the first token of each prompt, ascending."""
    began = time.perf_counter()
    for number, prompt in enumerate(prompts):
        engine.add(Sequence(str(number), prompt, answer, Sampling(temperature=0.0, ignore_eos=True)))
    times: list[float] = []
    while not engine.idle:
        first = sum(isinstance(token, DrawnToken) and token.index == 0 for token in engine.step())
        times += [time.perf_counter() - began] * first
    return times


def line(model: str, name: str, tokens: int, runs: list[list[float]]) -> str:
    """The figures of a load: medians over its runs."""
    last, middle, high = (np.median([np.percentile(run, share) for run in runs]) for share in (100, 50, 95))
    return (
        f"{model:14} {name:>8} {tokens / last:10,.0f} prompt tokens/s"
        f"  first token p50 {1e3 * middle:7.2f}, p95 {1e3 * high:7.2f} ms"
    )


def main() -> None:
    """Parse the arguments, load each model, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--load", action="append", metavar="PROMPTSxTOKENS", help=f"by default {' '.join(LOADS)}")
    parser.add_argument("--answer", type=int, default=1, help="tokens of each answer")
    parser.add_argument("--max-running", type=int, default=64)
    parser.add_argument("--runs", type=int, default=7)
    chosen = parser.parse_args()
    rng = random.Random(1)
    flags = {"engine.max_running": chosen.max_running, "model.context": 4096, "engine.prefix_cache": False}
    for path in chosen.models:
        settings = load_settings(flags=flags)
        model = load(path, settings.model, settings.engine)
        ids = text_ids(model.vocab_size)
        for name in chosen.load or LOADS:
            count, tokens = map(int, name.split("x"))
            runs = [
                first_tokens(model.engine, [rng.choices(ids, k=tokens) for _ in range(count)], chosen.answer)
                for _ in range(1 + chosen.runs)
            ]
            print(line(path.stem, name, count * tokens, runs[1:]), flush=True)
        del model


if __name__ == "__main__":
    main()
