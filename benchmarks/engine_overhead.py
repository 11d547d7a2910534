"""What does a step cost beside the model? The engine over a runner that computes nothing, beside the least step.

    python -m benchmarks.engine_overhead

The least step makes the arrays of a batch, asks the same runner and keeps the token: what no engine can leave out. Both
take turns in one process and are counted in CPU time, so their ratio holds on a busy machine too; `make check` judges
it (`tests/engine/test_overhead.py`).
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
    """A decode step of the engine: the first tokens of an answer that is long enough."""
    engine = Engine(EchoRunner(VOCABULARY, BLOCKS), EngineSettings(context=16 * BLOCKS))
    engine.add(Sequence("a", list(range(PROMPT)), 15 * BLOCKS))
    engine.step()
    return engine.step


def least_step() -> Step:
    """The same of an engine that knows one sequence, no end and no waiting."""
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


def compare(step: Step, least: Step) -> tuple[float, float]:
    """Microseconds of CPU time a step, and how many least steps that is: medians over the turns."""
    pairs = [(_microseconds(step), _microseconds(least)) for _ in range(TURNS)]
    return statistics.median(a for a, _ in pairs), statistics.median(a / b for a, b in pairs)


def _microseconds(step: Step) -> float:
    began = time.thread_time_ns()
    for _ in range(STEPS):
        step()
    return (time.thread_time_ns() - began) / STEPS / 1e3


def main() -> None:
    microseconds, ratio = compare(engine_step(), least_step())
    print(f"engine's own overhead a step: {microseconds:.1f} µs, {ratio:.1f} times the least step")
    print(f"promised: under {LIMIT_US:.0f} µs")


if __name__ == "__main__":
    main()
