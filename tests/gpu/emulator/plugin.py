"""Run GPU tests emulated: python -m pytest -p tests.gpu.emulator.plugin tests/gpu/test_matvec.py

The plugin installs the emulated `cupy` before tests are collected and keeps compiled kernels in
pytest's cache. `--fibers backwards` reverses the order in which threads and blocks run: a test that
fails only then has found a race.
"""

from __future__ import annotations

import sys

import pytest

from tests.gpu import served
from tests.gpu.emulator.compiler import why_no_compiler
from tests.gpu.emulator.host_cupy import installed


def pytest_addoption(parser):
    parser.addoption(
        "--fibers", choices=("forwards", "backwards"), default="forwards", help="order in which threads run"
    )


def pytest_configure(config):
    if reason := why_no_compiler():
        raise pytest.UsageError(reason)
    served.KERNEL_CACHE = config.cache.mkdir("emulated-kernels")
    sys.modules.update(installed(served.KERNEL_CACHE, backwards=config.getoption("fibers") == "backwards"))
