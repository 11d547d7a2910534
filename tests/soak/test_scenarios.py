"""The short form of each scenario, within wide bounds of time; the full forms are `make soak`."""

from __future__ import annotations

import importlib

import pytest

from tests.soak.__main__ import SCENARIOS


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")


@pytest.mark.parametrize("name", SCENARIOS)
async def test_the_short_form_of_the_scenario_is_within_its_bounds(name, tmp_path):
    scenario = importlib.import_module(f"tests.soak.{name}")
    figures = await scenario.run(scenario.SHORT, tmp_path)
    assert [figure.violation for figure in figures if figure.violation] == []
    assert sum(bool(figure.bound) for figure in figures) >= 4
