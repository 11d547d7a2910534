"""The CPU as a device: weights as f32 arrays, the host's memory counted like a card's. Next: `runner.py`."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil

from worker.backend import Bind, MemoryUse, Placement
from worker.cpu.runner import CpuRunner
from worker.gguf_file import GgufFile, TensorInfo
from worker.model import Hparams
from worker.ops import KV_BLOCK, QTensor
from worker.quants import dequantize

WEIGHT_BYTES = 4
"""Of every weight, whatever its type in the file."""


def upload(file: GgufFile, on_bytes: Callable[[int], None] = lambda _: None) -> Callable[[TensorInfo], QTensor]:
    """An upload for `worker.adapters.weights.Weights`: the tensor as f32; `on_bytes` hears the file bytes read."""

    def load(info: TensorInfo) -> QTensor:
        values = dequantize(file.data(info), info.kind).reshape(info.shape)
        on_bytes(info.nbytes)
        return QTensor(info.name, info.shape, info.kind, values)

    return load


class CpuBackend:
    """`worker.backend.Backend` on NumPy. `kv_dtype` f32 is the exact reference, f16 mirrors a GPU's cache."""

    name = "cpu"
    prefill_chunk = 64
    uploads_aside = False

    def __init__(self, kv_dtype: type[np.floating[Any]] = np.float32) -> None:
        self.device = platform.processor() or platform.machine()
        self._kv_dtype = kv_dtype
        self._runtime = psutil.Process().memory_info().rss
        self._placed: tuple[Placement, int] | None = None

    def weight_bytes(self, info: TensorInfo) -> int:
        """See `Backend.weight_bytes`."""
        return int(np.prod(info.shape)) * WEIGHT_BYTES

    def kv_bytes_per_token(self, hp: Hparams) -> int:
        """See `Backend.kv_bytes_per_token`."""
        return hp.kv_bytes_per_token(np.dtype(self._kv_dtype).itemsize)

    def overhead_bytes(self, hp: Hparams) -> int:
        """The logits and a chunk's widest activations; small beside f32 weights."""
        widest = max(hp.vocab_size, hp.q_width, hp.feed_forward_length * max(1, hp.expert_used_count))
        return 4 * self.prefill_chunk * 4 * widest

    def available_bytes(self) -> int:
        """See `Backend.available_bytes`."""
        return int(psutil.virtual_memory().available)

    def load(self, file: GgufFile, placement: Placement, bind: Bind, on_bytes: Callable[[int], None]) -> CpuRunner:
        """See `Backend.load`."""
        model = bind(upload(file, on_bytes))
        hp = placement.hparams
        self._placed = placement, placement.kv_blocks * KV_BLOCK * self.kv_bytes_per_token(hp)
        return CpuRunner(
            model,
            hp,
            kv_blocks=placement.kv_blocks,
            kv_dtype=self._kv_dtype,
            padding_ids=placement.padding_ids,
            end_ids=placement.end_ids,
        )

    def memory(self) -> MemoryUse:
        """See `Backend.memory`. Between steps no activation lives; the KV cache counts whole before it is touched."""
        if self._placed is None:
            return MemoryUse(runtime=self._runtime, free=self.available_bytes())
        placement, kv = self._placed
        weights = sum(self.weight_bytes(info) for info in placement.weights)
        return MemoryUse(weights=weights, kv=kv, runtime=self._runtime, free=self.available_bytes())

    def non_resident(self) -> tuple[int, list[str]]:
        """Every array of the host is plain memory."""
        return (len(self._placed[0].weights) if self._placed else 0), []
