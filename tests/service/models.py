"""Models to serve in tests: shared ones with fresh engines, slow, blocking and failing runners."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from worker.backend import MemoryUse
from worker.config import EngineSection, ModelSection
from worker.echo import load_echo
from worker.engine import Engine
from worker.engine.kv_blocks import KvBlocks
from worker.model import SlotDraw
from worker.runtime import LoadedModel, load


class SharedModel:
    """A loaded model; each worker gets a fresh engine, of which only one may run at a time.

    `reference` is a second copy, with a KV cache of its own, that may run beside a worker.
    """

    def __init__(self, load: Callable[[], LoadedModel]) -> None:
        self.loaded = load()
        self.runner = self.loaded.engine._runner
        self._load = load

    @cached_property
    def reference(self) -> SharedModel:
        return SharedModel(self._load)

    @classmethod
    def from_file(cls, path: Path, **engine: Any) -> SharedModel:
        section = EngineSection(backend="cpu", **engine)
        return cls(lambda: load(path, ModelSection(), section, lambda done, total: None))

    @classmethod
    def echo(cls, context: int = 4096) -> SharedModel:
        return cls(lambda: load_echo(context, 64, 0.0, lambda done, total: None))

    def fresh(self, runner: Any = None, **changes: Any) -> LoadedModel:
        """The model with a new engine over `runner`, by default the model's own."""
        runner = runner or with_own_slots(self.runner)
        engine = Engine(runner, self.loaded.engine.settings, KvBlocks(runner.kv_blocks))
        return replace(self.loaded, engine=engine, **changes)


def with_own_slots(runner: Any) -> Any:
    """A runner that shares model and KV cache, but not the slots: a dropped engine leaves sequences in them."""
    own = copy.copy(runner)
    own._generating = {}
    return own


class ScriptedRunner:
    """A runner that calls `script(step)` while a step is running: it may sleep, wait or raise.

    It calls `launch(step)` before the step is launched.
    """

    def __init__(
        self, runner: Any, script: Callable[[int], None], launch: Callable[[int], None] = lambda step: None
    ) -> None:
        self.vocab_size, self.kv_blocks, self.slots = runner.vocab_size, runner.kv_blocks, runner.slots
        self.step_wait = None
        self.steps = 0
        self._runner, self._script, self._launch = with_own_slots(runner), script, launch
        self.stop, self.extend, self.reset = self._runner.stop, self._runner.extend, self._runner.reset
        self.first_draws = self._runner.first_draws

    def run(self, chunks: Any, on_launched: Callable[[], None]) -> list[SlotDraw]:
        step, self.steps = self.steps, self.steps + 1
        self._launch(step)
        on_launched()
        self._script(step)
        return self._runner.run(chunks)


class StepBarrier:
    """Blocks the engine at step `at` until it is released; `script` is for `ScriptedRunner`."""

    def __init__(self, at: int) -> None:
        self.reached, self._released, self._at = threading.Event(), threading.Event(), at

    def script(self, step: int) -> None:
        if step == self._at:
            self.reached.set()
            assert self._released.wait(30), "the barrier was not released"

    async def wait_until_reached(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, 10), "the engine did not reach the barrier"

    def release(self) -> None:
        self._released.set()


def slow_model(seconds: float) -> LoadedModel:
    """An echo model, each step of which takes `seconds`."""
    model = SharedModel.echo()
    return model.fresh(ScriptedRunner(model.runner, lambda step: time.sleep(seconds)))


def failing_model(error: Exception, at: int, times: int = 1) -> LoadedModel:
    """An echo model, `times` steps of which raise `error`, from step `at` on."""
    model = SharedModel.echo()

    def script(step: int) -> None:
        if at <= step < at + times:
            raise error

    return model.fresh(ScriptedRunner(model.runner, script))


class FixedDevice:
    """A device with constant memory use."""

    device = "fake"

    def __init__(self, use: MemoryUse) -> None:
        self._use = use

    def memory(self) -> MemoryUse:
        return self._use

    def non_resident(self) -> tuple[int, list[str]]:
        return 3, []
