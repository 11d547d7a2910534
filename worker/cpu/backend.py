"""The CPU as a device: weights as f32 arrays, and the host's memory accounted like a card's. Next: `runner.py`."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import resources
from typing import Any

import numpy as np
import psutil
from threadpoolctl import threadpool_info

from worker.backend import MemoryUse, Plan, Upload
from worker.cpu.runner import CpuRunner
from worker.gguf_file import GgufFile, TensorInfo
from worker.model import Hparams, Model
from worker.ops import KV_BLOCK, QTensor
from worker.quants import Floats, dequantize

WEIGHT_BYTES = 4
"""Bytes of a weight, whatever its type in the file."""


@contextmanager
def uploader(file: GgufFile, on_bytes: Callable[[int], None] = lambda _: None) -> Iterator[Upload]:
    """See `Backend.uploader`: tensors become f32 arrays, which are filled when the context is left."""
    targets: list[tuple[TensorInfo, Floats]] = []

    def upload(info: TensorInfo) -> QTensor:
        values = np.empty(info.shape, np.float32)
        targets.append((info, values))
        return QTensor(info.name, info.shape, info.kind, values)

    yield upload
    for info, values in targets:
        dequantize(file.data(info), info.kind, out=values)
        on_bytes(info.nbytes)


class CpuBackend:
    """`worker.backend.Backend` on NumPy. `kv_dtype` f32 is the exact reference, f16 matches a GPU's cache."""

    name = "cpu"
    prefill_chunk = 64
    kv_share = 0.0
    """One context: the pool is memory of a laptop that other programs need."""

    def __init__(self, kv_dtype: type[np.floating[Any]] = np.float32) -> None:
        self.device = platform.processor() or platform.machine()
        self._kv_dtype = kv_dtype
        self._runtime_bytes = psutil.Process().memory_info().rss
        self._plan: Plan | None = None

    def weight_bytes(self, info: TensorInfo) -> int:
        """See `Backend.weight_bytes`."""
        return int(np.prod(info.shape)) * WEIGHT_BYTES

    def kv_bytes_per_token(self, hp: Hparams) -> int:
        """See `Backend.kv_bytes_per_token`."""
        return hp.kv_bytes_per_token(np.dtype(self._kv_dtype).itemsize)

    def overhead_bytes(self, hp: Hparams) -> int:
        """See `Backend.overhead_bytes`: the logits and a chunk's widest activations."""
        widest = max(hp.vocab_size, hp.q_width, hp.feed_forward_length * max(1, hp.expert_used_count))
        return 4 * self.prefill_chunk * 4 * widest

    def available_bytes(self) -> int:
        """See `Backend.available_bytes`."""
        return int(psutil.virtual_memory().available)

    @contextmanager
    def uploader(self, file: GgufFile, plan: Plan, on_bytes: Callable[[int], None]) -> Iterator[Upload]:
        """See `Backend.uploader`."""
        with uploader(file, on_bytes) as upload:
            yield upload
        self._plan = plan

    def runner(self, model: Model, plan: Plan, *, padding_ids: Iterable[int], end_ids: Iterable[int]) -> CpuRunner:
        """See `Backend.runner`."""
        return CpuRunner(
            model,
            plan.hparams,
            kv_blocks=plan.kv_blocks,
            kv_dtype=self._kv_dtype,
            padding_ids=padding_ids,
            end_ids=end_ids,
        )

    def memory(self) -> MemoryUse:
        """See `Backend.memory`. No activation outlives a step; the KV cache counts whole before it is touched."""
        if self._plan is None:
            return MemoryUse(runtime=self._runtime_bytes, free=self.available_bytes())
        return MemoryUse(
            weights=self._plan.weight_bytes,
            kv=self._plan.kv_blocks * KV_BLOCK * self._plan.kv_bytes_per_token,
            runtime=self._runtime_bytes,
            free=self.available_bytes(),
        )

    def non_resident(self) -> tuple[int, list[str]]:
        """See `Device.non_resident`: every array of the host is plain memory."""
        return (len(self._plan.weights) if self._plan else 0), []

    def numerics(self) -> dict[str, str]:
        """See `Backend.numerics`. The number of threads is not among the facts: `threads.py` makes bits independent."""
        sources = hashlib.sha256()
        for source in sorted(resources.files("worker.cpu").iterdir(), key=lambda each: each.name):
            if source.name.endswith(".py"):
                sources.update(source.read_bytes())
        blas = [each for each in threadpool_info() if each["user_api"] == "blas"]
        libraries = sorted(f"{each['internal_api']} {each['version']} {each.get('architecture')}" for each in blas)
        return {
            "backend": self.name,
            "numpy": np.__version__,
            "blas": ", ".join(libraries),
            "machine": platform.machine(),
            "kv_type": np.dtype(self._kv_dtype).name,
            "sources": sources.hexdigest(),
        }
