"""What a device is to the runtime: memory arithmetic before a model, loading it, and memory as it is afterwards.

Implemented by `worker/cpu/backend.py` and `worker/gpu/backend.py`. Everything here is called on the one thread that
owns the device. Knows no architecture: `bind` makes the model over the uploads that the backend gives it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from worker.gguf_file import GgufFile, TensorInfo
from worker.model import Hparams, Model, Runner
from worker.ops import QTensor

Upload = Callable[[TensorInfo], QTensor]
Bind = Callable[[Upload], Model]
"""Makes the model out of a file's tensors, uploading each."""


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes by purpose. `runtime` is what the process or the device's context took before the model came."""

    weights: int = 0
    kv: int = 0
    activations: int = 0
    workspace: int = 0
    runtime: int = 0
    free: int = 0

    @property
    def used(self) -> int:
        """Everything but `free`."""
        return self.weights + self.kv + self.activations + self.workspace + self.runtime


@dataclass(frozen=True, slots=True)
class Placement:
    """What is to be put on the device: fixed by the plan, before anything is copied."""

    hparams: Hparams
    weights: tuple[TensorInfo, ...]
    context: int
    """Longest sequence, in tokens."""
    kv_blocks: int
    padding_ids: frozenset[int]
    end_ids: frozenset[int]


class Device(Protocol):
    """The part of a backend that the service uses once a model is loaded, on the engine's thread."""

    device: str
    """The device's own name, as logs and `worker inspect` give it."""

    def memory(self) -> MemoryUse:
        """Bytes by purpose, now."""
        ...

    def non_resident(self) -> tuple[int, list[str]]:
        """Number of allocations checked, and the addresses of those that are not plain device memory."""
        ...


class Backend(Device, Protocol):
    """One device: memory arithmetic before a model is loaded, loading, accounting afterwards."""

    name: str
    """cpu or gpu."""
    prefill_chunk: int
    """Prompt tokens a step where the settings don't say: how long a cancellation waits."""

    uploads_aside: bool
    """Whether a tensor's upload, once begun, goes on while the host does other things."""

    def weight_bytes(self, info: TensorInfo) -> int:
        """What a tensor takes on the device. Raises ModelLoadFailed where the device can't serve its shape."""
        ...

    def kv_bytes_per_token(self, hp: Hparams) -> int:
        """K and V of one token over all layers."""
        ...

    def overhead_bytes(self, hp: Hparams) -> int:
        """Activations and workspace, at most."""
        ...

    def available_bytes(self) -> int:
        """What is free now."""
        ...

    def load(self, file: GgufFile, placement: Placement, bind: Bind, on_bytes: Callable[[int], None]) -> Runner:
        """Upload and bind; `on_bytes` hears each piece's file bytes, one call at a time, from any thread.

        Raises VramOom, CudaError, ModelLoadFailed, and what `bind` raises; then nothing is left on the device.
        """
        ...
