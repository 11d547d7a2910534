"""The primary context is created in the background; without a driver nothing happens."""

from __future__ import annotations

import threading

import pytest

from worker import gpu as gpu_package


def create_context():
    """Create the context and wait for the thread, as the end of the process does."""
    gpu_package.create_context_in_background()
    for thread in threading.enumerate():
        if thread.name == "cuda-context":
            assert not thread.daemon
            thread.join(30)


class FakeDriver:
    """Returns a status for each driver function, by its name, and records the calls."""

    def __init__(self, **statuses):
        self.calls = []
        self._statuses = statuses

    def __getattr__(self, name):
        return lambda *args: self.calls.append(name) or self._statuses.get(name, 0)


@pytest.mark.parametrize(
    ("driver", "calls"),
    [
        (FakeDriver(), ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]),
        (FakeDriver(cuInit=100), ["cuInit"]),
        (FakeDriver(cuDeviceGet=101), ["cuInit", "cuDeviceGet"]),
    ],
    ids=["a device", "no device", "a hidden device"],
)
def test_the_first_device_s_primary_context_is_retained(monkeypatch, driver, calls):
    monkeypatch.setattr(gpu_package.ctypes, "CDLL", lambda name: driver)
    create_context()
    assert driver.calls == calls


def test_a_machine_without_a_driver_prints_nothing(monkeypatch, capfd):
    monkeypatch.setattr(gpu_package, "_DRIVER", "libno-such-driver.so.1")
    create_context()
    assert capfd.readouterr().err == ""


def test_cupy_works_in_the_context_that_was_created(gpu):
    create_context()
    assert gpu.arange(4).get().tolist() == [0, 1, 2, 3]
