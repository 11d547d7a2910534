"""The CPU's Runner: holds the KV cache, runs batches and draws tokens. Next: `ops.py`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from worker.cpu.attention import KvCache
from worker.cpu.ops import CpuOps
from worker.cpu.sampler import Sampler
from worker.cpu.threads import Threads
from worker.model import Model, OnLaunched
from worker.ops import Batch, Phase
from worker.sampling import Draw, DrawRequest


class CpuRunner:
    """`worker.model.Runner` on NumPy."""

    def __init__(self, model: Model, cache: KvCache, sampler: Sampler) -> None:
        self.vocab_size = sampler.vocab_size
        self.kv_blocks = cache.blocks
        self.cache = cache
        self._model = model
        self._sampler = sampler
        for layer in model.layers:
            _ = layer.attention.rope.cos  # compute the tables while loading, not in the first step
        threads = Threads()
        self._ops = {phase: CpuOps(cache, phase, threads) for phase in Phase}

    def run(self, batch: Batch, requests: Sequence[DrawRequest], on_launched: OnLaunched = lambda: None) -> list[Draw]:
        on_launched()
        return [self._sampler.draw(row, each) for row, each in zip(self.logits(batch), requests, strict=True)]

    def logits(self, batch: Batch) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The model's logits [R, V] f32, for comparisons."""
        result: np.ndarray[Any, np.dtype[np.float32]] = self._model.forward(self._ops[batch.phase], batch)
        return result
