"""Metrics whose values are added in batches."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from worker.telemetry import BatchHistogram

BOUNDS = (0.0009765625, 0.25, 1.0, 30.0)


def exposition(registry: CollectorRegistry) -> str:
    """The text without the time of creation."""
    return re.sub(r"_created [0-9.e+]+", "_created", generate_latest(registry).decode())


@given(st.lists(st.lists(st.sampled_from([0.0, 0.0009765625, 0.25, 0.5, 1.0, 30.0, 31.0]), max_size=5), max_size=5))
def test_a_batch_histogram_is_exposed_as_the_library_exposes_its_own(batches: list[list[float]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    histogram = BatchHistogram(ours, BOUNDS, "worker_test_seconds", "A test.")
    reference = Histogram("worker_test_seconds", "A test.", buckets=BOUNDS, registry=theirs)
    for batch in batches:
        histogram.observe(batch)
        for value in batch:
            reference.observe(value)

    assert exposition(ours) == exposition(theirs)
