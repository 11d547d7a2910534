"""CPU time of an engine step without the model, beside a minimal step, for 1 and 64 sequences.

    python -m benchmarks.engine_overhead

Both run EchoRunner, which computes nothing. The minimal step calls the runner and appends the
tokens: work that no engine can omit. Both alternate in one process and are measured in CPU time, so
their ratio also holds on a busy machine; `make check` bounds it (`tests/engine/test_overhead.py`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from worker.echo import EchoRunner
from worker.engine import Engine, EngineSettings, Sequence
from worker.model import Chunk, SlotStart
from worker.sampling import Draw, Sampling

PROMPT, STEPS, TURNS, VOCABULARY, CONTEXT = 64, 100, 15, 1000, 1 << 14
LIMITS_US = {1: 50.0, 64: 128.0}
"""Bounds of a step by its number of sequences."""

Step = Callable[[], object]


def engine_step(sequences: int) -> Step:
    """Return a decode step of the engine, in answers longer than all measured steps."""
    runner = EchoRunner(VOCABULARY, sequences * CONTEXT // 16, slots=sequences)
    engine = Engine(runner, EngineSettings(CONTEXT, PROMPT * sequences, sequences))
    for number in range(sequences):
        engine.add(Sequence(str(number), list(range(PROMPT)), CONTEXT - PROMPT))
    engine.step()
    assert len(engine.step()) == sequences
    return engine.step


def minimal_step(sequences: int) -> Step:
    """Return a decode step without end conditions or scheduling."""
    runner, table = EchoRunner(VOCABULARY, 1, slots=sequences), np.zeros(1, np.int32)
    prompt, generated = list(range(PROMPT)), [list[int]() for _ in range(sequences)]
    starts = [SlotStart(slot, prompt, Sampling(), frozenset(), CONTEXT) for slot in range(sequences)]
    runner.run([Chunk(np.arange(PROMPT, dtype=np.int32), 0, table, start) for start in starts])

    def step() -> None:
        for slot, draw in runner.run(()):
            assert isinstance(draw, Draw)
            generated[slot].append(draw.id)

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
    for sequences, limit in LIMITS_US.items():
        microseconds, ratio = compare(engine_step(sequences), minimal_step(sequences))
        each = microseconds / sequences
        print(f"{sequences} sequences: {microseconds:.1f} µs a step, {each:.2f} µs each, {ratio:.1f} times the minimum")
        print(f"bound: under {limit:.0f} µs")


if __name__ == "__main__":
    main()
