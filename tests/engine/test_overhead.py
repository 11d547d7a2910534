"""The engine's overhead a step, relative to a minimal step: at most 50 µs where that takes 6 µs."""

from __future__ import annotations

from benchmarks.engine_overhead import compare, engine_step, minimal_step

LIMIT = 8.0


def test_a_step_of_the_engine_costs_a_few_minimal_steps():
    _, ratio = compare(engine_step(), minimal_step())
    assert 1 < ratio < LIMIT


def test_a_step_with_more_overhead_exceeds_the_limit():
    step, more = engine_step(), minimal_step()

    def heavy():
        step()
        for _ in range(12):
            more()

    _, ratio = compare(heavy, minimal_step())
    assert ratio > LIMIT
