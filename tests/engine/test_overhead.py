"""The engine's own cost a step as a ratio: 50 µs where the least step takes 6, as on the machine of the README."""

from __future__ import annotations

from benchmarks.engine_overhead import compare, engine_step, least_step

LIMIT = 8.0


def test_a_step_of_the_engine_costs_a_few_least_steps():
    _, ratio = compare(engine_step(), least_step())
    assert 1 < ratio < LIMIT


def test_a_step_that_does_much_more_is_noticed():
    step, more = engine_step(), least_step()

    def heavy():
        step()
        for _ in range(12):
            more()

    _, ratio = compare(heavy, least_step())
    assert ratio > LIMIT
