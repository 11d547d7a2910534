"""The CPU's Runner: holds the KV cache, computes batches and draws tokens. Next: `ops.py`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from worker.cpu.kv_cache import KvCache
from worker.cpu.ops import CpuOps
from worker.cpu.sampler import Sampler
from worker.cpu.slots import HostSlots
from worker.cpu.threads import Threads
from worker.errors import Internal
from worker.model import Model
from worker.ops import Batch, Phase
from worker.sampling import Draw, DrawRequest


class CpuRunner(HostSlots):
    """`worker.model.Runner` on NumPy."""

    def __init__(self, model: Model, cache: KvCache, sampler: Sampler, slots: int = 1) -> None:
        super().__init__(slots, self.compute, sampler.masks)
        self.vocab_size = sampler.vocab_size
        self.kv_blocks = cache.blocks
        self.cache = cache
        self._model = model
        self._sampler = sampler
        for layer in model.layers:
            _ = layer.attention.rope.cos  # compute the tables while loading, not in the first step
        threads = Threads()
        self._ops = {phase: CpuOps(cache, phase, threads) for phase in Phase}

    def compute(self, batch: Batch, requests: Sequence[DrawRequest]) -> list[Draw | None]:
        """The draws of a batch; None where the logits are not finite."""
        return [self._draw_row(row, each) for row, each in zip(self.logits(batch), requests, strict=True)]

    def logits(self, batch: Batch) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The model's logits [R, V] f32, for comparisons."""
        result: np.ndarray[Any, np.dtype[np.float32]] = self._model.forward(self._ops[batch.phase], batch)
        return result

    def _draw_row(self, logits: np.ndarray[Any, np.dtype[np.float32]], request: DrawRequest) -> Draw | None:
        try:
            return self._sampler.draw(logits, request)
        except Internal:
            return None
