"""How fast does the CPU backend answer? SmolLM2's decode and prefill beside llama.cpp's on the same cores.

    python -m benchmarks.cpu_decode [MODEL]

The bytes are those of the f32 weights that one token reads; llama.cpp reads the quantized ones, a seventh of them.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

from tests.llama_cpp import LlamaCpp
from worker import hub, runtime
from worker.config import load_settings
from worker.engine import Sequence
from worker.sampling import Sampling

PROMPT, TOKENS, RUNS = 512, 64, 3


def one_run(loaded: runtime.LoadedModel) -> tuple[float, float]:
    """Prefill and decode, tokens a second."""
    loaded.engine.add(Sequence("a", list(range(1000, 1000 + PROMPT)), TOKENS, Sampling(temperature=0)))
    began = time.perf_counter()
    while not loaded.engine.step():
        pass
    first = time.perf_counter()
    while not loaded.engine.idle:
        loaded.engine.step()
    return PROMPT / (first - began), (TOKENS - 1) / (time.perf_counter() - first)


def main(model: str = "smollm2") -> None:
    settings = load_settings(flags={"engine.backend": "cpu", "model.context": 1024})
    path: Path = hub.resolve(model, settings.hub.cache)
    began = time.perf_counter()
    loaded = runtime.load(path, settings.model, settings.engine)
    load_s = time.perf_counter() - began
    runs = [one_run(loaded) for _ in range(RUNS)]
    prefill, decode = (statistics.median(column) for column in zip(*runs, strict=True))
    print(f"{loaded.name}: loaded in {load_s:.1f} s; prefill {prefill:.0f} tokens/s, decode {decode:.1f} tokens/s")
    with LlamaCpp(path, context=1024, threads=2) as other:
        print(f"llama.cpp on 2 threads: decode {other.decode_speed(TOKENS):.1f} tokens/s")
    print(f"promised: decode at 10 tokens/s or more (vocabulary {loaded.vocab_size:,})")


if __name__ == "__main__":
    main(*sys.argv[1:])
