"""Decode and prefill of SmolLM2 on the CPU backend, beside llama.cpp on the same cores.

    python -m benchmarks.cpu_decode [MODEL]

The worker reads f32 weights; llama.cpp reads the quantized ones, a seventh of the bytes.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

from tests.llama_cpp import LlamaCpp
from worker import hub, runtime
from worker.bench.timing import Prompts, repeated, timed
from worker.config import load_settings

PROMPT, TOKENS, RUNS = 512, 64, 3


def main(model: str = "smollm2") -> None:
    settings = load_settings(flags={"engine.backend": "cpu", "model.context": 1024})
    path: Path = hub.resolve(model, settings.hub.cache)
    began = time.perf_counter()
    loaded = runtime.load(path, settings.model, settings.engine)
    load_s = time.perf_counter() - began
    prompts = Prompts(loaded.vocab_size)
    runs = repeated(lambda: timed(loaded.engine, prompts.next(PROMPT), TOKENS), RUNS, 0)
    first_s, token_s = (statistics.median(column) for column in zip(*runs, strict=True))
    print(
        f"{loaded.name}: loaded in {load_s:.1f} s; "
        f"prefill {PROMPT / first_s:.0f} tokens/s, decode {1 / token_s:.1f} tokens/s"
    )
    with LlamaCpp(path, context=1024, threads=2) as llama:
        print(f"llama.cpp on 2 threads: decode {llama.decode_speed(TOKENS):.1f} tokens/s")
    print(f"goal: decode at 10 tokens/s or more (vocabulary {loaded.vocab_size:,})")


if __name__ == "__main__":
    main(*sys.argv[1:])
