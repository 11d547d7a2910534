"""The context is made beside the imports; without a driver nothing happens, and nothing is said."""

from __future__ import annotations

import threading

import pytest

from worker.gpu import wake


def woken():
    """Wake, and wait for it as the process's end does."""
    wake.wake_device()
    for thread in threading.enumerate():
        if thread.name == "wake":
            assert not thread.daemon
            thread.join(30)


class FakeDriver:
    """Answers each call with the status of its name, and remembers it."""

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
    ids=["a device", "no device", "a device that is hidden"],
)
def test_the_first_device_s_own_context_is_taken_if_there_is_one(monkeypatch, driver, calls):
    monkeypatch.setattr(wake.ctypes, "CDLL", lambda name: driver)
    woken()
    assert driver.calls == calls


def test_a_machine_without_a_driver_hears_nothing_of_it(monkeypatch, capfd):
    monkeypatch.setattr(wake, "_DRIVER", "libno-such-driver.so.1")
    woken()
    assert capfd.readouterr().err == ""


def test_cupy_works_in_the_context_that_was_woken(gpu):
    woken()
    assert gpu.arange(4).get().tolist() == [0, 1, 2, 3]
