"""Each allocation of a load fails once, memory is full, the device is lost: nothing leaks.

The n-th allocation fails for n = 1, 2, 3, … until a load succeeds. Accounted bytes must return to
their baseline after each failure. The driver's figure is compared once over all failures: a leak of
one slab per failure would be gigabytes. `test_runner.py` covers the allocations of jobs.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.gpu.served import KERNEL_CACHE, Child, answer, device_bytes, load, settle
from worker import runtime
from worker.config import EngineSection, ModelSection
from worker.errors import CudaError, InsufficientVram, ModelLoadFailed, VramOom
from worker.sampling import Sampling

PROMPT = np.random.default_rng(11).integers(0, 280, 70).tolist()
WARM = Sampling(temperature=0.8, seed=5)
TOKENS = 12
DRIVERS_OWN = 4 << 20


class Faults:
    """Counts allocations and fails the one whose number is `at`."""

    def __init__(self):
        self.count = 0
        self.at = 0

    def __call__(self, number):
        self.count = number
        return number == self.at

    def arm(self, nth):
        """Fail the nth allocation after this call."""
        self.at = self.count + nth

    def disarm(self):
        """Stop failing."""
        self.at = 0


@pytest.fixture
def faulty(gpu, monkeypatch):
    """A backend of the runtime whose allocations can fail, and its Faults."""
    from worker.gpu.backend import GpuBackend
    from worker.gpu.memory import DeviceMemory

    faults, backend = Faults(), GpuBackend(KERNEL_CACHE)
    backend._memory = DeviceMemory(faults)
    monkeypatch.setattr(runtime, "open_backend", lambda engine: backend)
    return backend, faults


def refused(attempt):
    """The code of an attempt's VramOom (its frames would keep memory alive), or None."""
    try:
        attempt()
    except VramOom as error:
        return error.code
    return None


def finish(engine):
    while not engine.idle:
        engine.step()


@pytest.mark.parametrize("name", ["gpt-oss", "qwen2"])
def test_a_failure_of_each_allocation_of_a_load_leaks_nothing(name, tiny, faulty):
    backend, faults = faulty
    path = tiny(name)
    expected = answer(load(path), PROMPT, WARM, TOKENS)
    settle()
    assert backend.memory().used == backend.memory().runtime
    before, nth = device_bytes(), 0
    while True:
        nth += 1
        faults.arm(nth)
        code = refused(lambda: load(path))
        settle()
        used = backend.memory()
        assert (used.weights, used.kv, used.activations, used.workspace) == (0, 0, 0, 0), f"allocation {nth}"
        if code is None:
            break
        assert code == "VRAM_OOM"
    faults.disarm()
    assert nth > 50
    assert device_bytes() <= before + DRIVERS_OWN
    assert answer(load(path), PROMPT, WARM, TOKENS) == expected


def test_a_model_that_does_not_fit_is_refused_before_anything_is_copied(tiny, faulty):
    backend, faults = faulty
    backend.available_bytes = lambda: 1 << 20
    with pytest.raises(InsufficientVram) as refusal:
        runtime.load(tiny("llama"), ModelSection(), EngineSection(backend="gpu", kernel_cache=KERNEL_CACHE))
    assert refusal.value.details["required"] > refusal.value.details["available"] == 1 << 20
    assert faults.count == 0


def test_a_tokenizer_that_cannot_be_built_releases_the_weights(tiny, faulty, monkeypatch):
    backend, _ = faulty

    def broken(metadata, vocab):
        raise ModelLoadFailed("the merges don't fit", "tokenizer.ggml.merges", "pairs")

    with monkeypatch.context() as patched:
        patched.setattr(runtime, "build_tokenizer", broken)
        with pytest.raises(ModelLoadFailed, match="the merges don't fit"):
            load(tiny("gpt-oss"))
    settle()
    assert backend.memory().used == backend.memory().runtime
    assert len(answer(load(tiny("gpt-oss")), PROMPT, WARM, TOKENS)) == TOKENS


def test_a_full_gpu_is_insufficient_vram_and_serves_after_memory_is_freed(tiny, gpu):
    from worker.gpu.memory import DeviceMemory, Purpose

    settle()
    other = DeviceMemory()
    reserved = other.reserve(other.free - (128 << 20), Purpose.WORKSPACE)
    assert other.free < 256 << 20
    with pytest.raises(InsufficientVram):
        load(tiny("llama"))
    del reserved
    assert len(answer(load(tiny("llama")), PROMPT, WARM, TOKENS)) == TOKENS


def test_a_lost_device_ends_the_process_with_2_and_another_process_continues(tiny, gpu):
    path = tiny("gpt-oss")
    whole = answer(load(path), PROMPT, WARM, 40)
    first = Child(path, PROMPT, seed=WARM.seed, tokens=40, trap=9)
    code, published, stderr = first.finish()
    assert code == CudaError.exit_code == 2, stderr
    assert "CUDA_ERROR" in stderr
    assert published == whole[: len(published)]
    assert len(published) >= 9
    code, rest, stderr = Child(path, PROMPT, seed=WARM.seed, tokens=40, replay=published).finish()
    assert code == 0, stderr
    assert published + rest == whole
