"""The CPU's Runner: uploads a file's weights as f32 arrays, holds the KV cache, runs batches and draws tokens.

`CpuBackend` is what a model is loaded onto; `CpuRunner` is what the engine drives afterwards. Knows no architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from worker.cpu.kv_cache import KvCache
from worker.cpu.ops import CpuOps
from worker.cpu.sampler import Sampler
from worker.cpu.threads import Threads
from worker.gguf_file import GgufFile, TensorInfo
from worker.model import Hparams, Model
from worker.ops import Batch, Phase, QTensor
from worker.quants import dequantize
from worker.sampling import Draw, DrawRequest

WEIGHT_BYTES = 4
"""Bytes a weight takes here, whatever its type in the file."""


def weight_bytes(info: TensorInfo) -> int:
    """Memory that a tensor takes once it is uploaded."""
    return int(np.prod(info.shape)) * WEIGHT_BYTES


def upload(file: GgufFile, on_bytes: Callable[[int], None] = lambda _: None) -> Callable[[TensorInfo], QTensor]:
    """An upload for `worker.adapters.weights.Weights`: the tensor as f32; `on_bytes` hears the file bytes read."""

    def load(info: TensorInfo) -> QTensor:
        values = dequantize(file.data(info), info.kind).reshape(info.shape)
        on_bytes(info.nbytes)
        return QTensor(info.name, info.shape, info.kind, values)

    return load


class CpuRunner:
    """`worker.model.Runner` on NumPy."""

    def __init__(
        self,
        model: Model,
        hp: Hparams,
        *,
        kv_blocks: int,
        kv_dtype: type[np.floating[Any]] = np.float32,
        padding_ids: Iterable[int] = (),
        end_ids: Iterable[int] = (),
    ) -> None:
        self.vocab_size = hp.vocab_size
        self.kv_blocks = kv_blocks
        self.cache = KvCache(hp, kv_blocks, kv_dtype)
        self._model = model
        self._sampler = Sampler(hp.vocab_size, padding_ids, end_ids)
        threads = Threads()
        self._ops = {phase: CpuOps(self.cache, phase, threads) for phase in Phase}

    def run(self, batch: Batch, requests: Sequence[DrawRequest]) -> list[Draw]:
        """See `Runner.run`."""
        logits = self.logits(batch)
        return [self._sampler.draw(row, request) for row, request in zip(logits, requests, strict=True)]

    def logits(self, batch: Batch) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The model's logits [R, V] f32, for comparisons."""
        result: np.ndarray[Any, np.dtype[np.float32]] = self._model.forward(self._ops[batch.phase], batch)
        return result
