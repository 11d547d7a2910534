"""CPU time of an engine step without the model, beside a minimal step.

    python -m benchmarks.engine_overhead

Both run EchoRunner, which computes nothing. The minimal step builds the arrays of a batch, calls
the runner and appends the token: work that no engine can omit. Both alternate in one process and
are measured in CPU time, so their ratio also holds on a busy machine; `make check` bounds it
(`tests/engine/test_overhead.py`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from worker.echo import EchoRunner
from worker.engine import Engine, EngineSettings, Sequence
from worker.ops import Batch, Phase
from worker.sampling import DrawRequest, Sampling

PROMPT, STEPS, TURNS, VOCABULARY, BLOCKS = 64, 250, 15, 1000, 1024
LIMIT_US = 50.0

Step = Callable[[], object]


def engine_step() -> Step:
    """Return a decode step of the engine, in an answer longer than all measured steps."""
    engine = Engine(EchoRunner(VOCABULARY, BLOCKS), EngineSettings(context=16 * BLOCKS))
    engine.add(Sequence("a", list(range(PROMPT)), 15 * BLOCKS))
    engine.step()
    return engine.step


def minimal_step() -> Step:
    """Return a decode step of one sequence without end conditions or scheduling."""
    runner, sampling = EchoRunner(VOCABULARY, BLOCKS), Sampling()
    prompt, generated = list(range(PROMPT)), [0]
    table, row = np.arange(BLOCKS, dtype=np.int32), np.zeros(1, np.int32)

    def step() -> None:
        token = np.array(generated[-1:], np.int32)
        position = np.array([PROMPT + len(generated) - 1], np.int32)
        batch = Batch(Phase.DECODE, token, position, (table,), row)
        (draw,) = runner.run(batch, [DrawRequest(sampling, len(generated), prompt, generated)])
        generated.append(draw.id)

    return step


def compare(step: Step, minimal: Step) -> tuple[float, float]:
    """Return µs of CPU time of a step and the ratio to a minimal step: medians of TURNS pairs."""
    pairs = [(_microseconds(step), _microseconds(minimal)) for _ in range(TURNS)]
    return statistics.median(a for a, _ in pairs), statistics.median(a / b for a, b in pairs)


def _microseconds(step: Step) -> float:
    began = time.thread_time_ns()
    for _ in range(STEPS):
        step()
    return (time.thread_time_ns() - began) / STEPS / 1e3


def main() -> None:
    microseconds, ratio = compare(engine_step(), minimal_step())
    print(f"engine overhead per step: {microseconds:.1f} µs, {ratio:.1f} times the minimal step")
    print(f"bound: under {LIMIT_US:.0f} µs")


if __name__ == "__main__":
    main()
