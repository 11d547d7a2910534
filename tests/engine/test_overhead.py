"""The engine's overhead a step, relative to a minimal step, for one sequence and for many."""

from __future__ import annotations

import pytest

from benchmarks.engine_overhead import compare, engine_step, minimal_step

LIMITS = {1: 8.0, 64: 4.0}


@pytest.mark.parametrize("sequences", LIMITS)
def test_a_step_of_the_engine_costs_a_few_minimal_steps(sequences):
    _, ratio = compare(engine_step(sequences), minimal_step(sequences))
    assert 1 < ratio < LIMITS[sequences]


@pytest.mark.parametrize("sequences", LIMITS)
def test_a_step_with_more_overhead_exceeds_the_limit(sequences):
    step, more = engine_step(sequences), minimal_step(sequences)

    def heavy():
        step()
        for _ in range(12):
            more()

    _, ratio = compare(heavy, minimal_step(sequences))
    assert ratio > LIMITS[sequences]
