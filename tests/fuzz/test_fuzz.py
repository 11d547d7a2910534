"""The fuzzer's seeds and earlier findings again, and a short run of each target where atheris is."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from tests.fuzz.targets import REGRESSIONS, TARGETS, regressions, run_within_limits, target

RUNS = 1000


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_and_the_earlier_findings_are_none(name):
    module = target(name)
    seeds = list(module.seeds())
    assert seeds
    for data in seeds:
        run_within_limits(module, data)
    for path in regressions(name):
        run_within_limits(module, path.read_bytes())


def test_every_folder_of_findings_belongs_to_a_target():
    assert {path.name for path in REGRESSIONS.iterdir()} <= set(TARGETS)


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
@pytest.mark.parametrize("name", TARGETS)
def test_a_short_run_finds_nothing(name):
    command = [sys.executable, "-m", "tests.fuzz", name, "--runs", str(RUNS), "--seed", "1"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no finding" in done.stdout
