"""The CPU's Runner: holds the KV cache, runs batches and draws tokens. Knows no architecture. Next: `ops.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from worker.cpu.attention import KvCache
from worker.cpu.ops import CpuOps
from worker.cpu.sampler import Sampler
from worker.cpu.threads import Threads
from worker.model import Hparams, Model, OnLaunched
from worker.ops import Batch, Phase
from worker.sampling import Draw, DrawRequest


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
        for layer in model.layers:
            _ = layer.attention.rope.cos  # computed at load, not in the first step
        threads = Threads()
        self._ops = {phase: CpuOps(self.cache, phase, threads) for phase in Phase}

    def run(self, batch: Batch, requests: Sequence[DrawRequest], on_launched: OnLaunched = lambda: None) -> list[Draw]:
        """See `Runner.run`."""
        on_launched()
        logits = self.logits(batch)
        return [self._sampler.draw(row, request) for row, request in zip(logits, requests, strict=True)]

    def logits(self, batch: Batch) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The model's logits [R, V] f32, for comparisons."""
        result: np.ndarray[Any, np.dtype[np.float32]] = self._model.forward(self._ops[batch.phase], batch)
        return result
