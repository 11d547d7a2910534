"""Runs tests of the GPU emulated: python -m pytest -p tests.gpu.emulator.plugin tests/gpu/test_matvec.py

It puts a `cupy` of the host's into Python before any test is collected, and the compiled kernels into pytest's cache.
`--fibers backwards` lets threads and blocks take turns in another order: a test that then fails has found a race.
"""

from __future__ import annotations

import sys

import pytest

from tests.gpu import served
from tests.gpu.emulator.compiler import why_no_compiler
from tests.gpu.emulator.host_cupy import installed


def pytest_addoption(parser):
    parser.addoption("--fibers", choices=("forwards", "backwards"), default="forwards", help="whose turn is first")


def pytest_configure(config):
    if reason := why_no_compiler():
        raise pytest.UsageError(reason)
    served.KERNEL_CACHE = config.cache.mkdir("emulated-kernels")
    sys.modules.update(installed(served.KERNEL_CACHE, backwards=config.getoption("fibers") == "backwards"))
