"""What the service needs of a model: its names, its text, its engine and its memory.

`load_served` gets it from a file through `worker/runtime.py`; `worker/echo_model.py` makes one without a file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from worker import runtime
from worker.backend import MemoryUse
from worker.config import EngineSection, ModelSection
from worker.engine import Engine
from worker.jobs.protocol import Limits
from worker.runtime import Progress
from worker.text.tokenizer import Tokenizer


class Device(Protocol):
    """What the service asks of a `worker.backend.Backend`, on the engine's thread."""

    device: str
    """Its name, as logs give it."""

    def memory(self) -> MemoryUse:
        """Bytes by purpose, now."""
        ...

    def strays(self) -> tuple[int, list[str]]:
        """How many pieces of memory were checked, and those that don't lie in plain device memory."""
        ...


@dataclass(frozen=True, slots=True)
class Served:
    """A model that is ready to answer."""

    name: str
    fingerprint: str
    """Equal ones give equal tokens."""
    vocab_size: int
    tokenizer: Tokenizer
    engine: Engine
    device: Device
    kv_blocks: int
    """Of the engine, taken or not."""

    @property
    def limits(self) -> Limits:
        """What a job may ask of it."""
        return Limits(self.name, self.vocab_size, self.engine.context)


Loader = Callable[[Progress], Served]
"""Makes the model; called on the engine's thread."""


def load_served(path: Path, model: ModelSection, engine: EngineSection, progress: Progress) -> Served:
    """Open, check and load a model file. Raises ModelLoadFailed or InsufficientVram as `runtime.load` does."""
    loaded = runtime.load(path, model, engine, progress)
    return Served(
        name=loaded.name,
        fingerprint=loaded.fingerprint,
        vocab_size=loaded.hparams.vocab_size,
        tokenizer=loaded.tokenizer,
        engine=loaded.engine,
        device=loaded.backend,
        kv_blocks=loaded.engine.free_kv_blocks,
    )
