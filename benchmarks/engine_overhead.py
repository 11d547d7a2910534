"""What does a step cost beside the model? The engine over the echo model: microseconds a decode step.

python -m benchmarks.engine_overhead
"""

from __future__ import annotations

import statistics
import time

from worker.echo import EchoRunner
from worker.engine import Engine, EngineSettings, Sequence

PROMPT, TOKENS, RUNS = 64, 4000, 7
LIMIT_US = 50.0


def one_run() -> float:
    """Microseconds a decode step, the median of one answer."""
    engine = Engine(EchoRunner(vocab_size=1000, kv_blocks=1024), EngineSettings(context=16384))
    engine.add(Sequence("a", list(range(PROMPT)), TOKENS))
    engine.step()
    times = []
    while not engine.idle:
        began = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def main() -> None:
    runs = sorted(one_run() for _ in range(RUNS))
    print(
        f"engine's own overhead a step: {statistics.median(runs):.1f} µs ({runs[0]:.1f} to {runs[-1]:.1f}, {RUNS} runs)"
    )
    print(f"promised: under {LIMIT_US:.0f} µs")


if __name__ == "__main__":
    main()
