"""A model of one attention and one product, for tests of the runner: cheap also in the emulator.

Its logits are a row of a table for the newest token, plus what attention finds in the KV cache.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from worker.model import Hparams
from worker.ops import Attention, Linear, QTensor
from worker.quants import F32
from worker.rope import Rope, RopeScaling

VOCABULARY, DIM = 96, 64
BLOCKS, CONTEXT = 48, 320
BROKEN = 95
"""After this token no token can be drawn: its logits are NaN."""


class Chain:
    """`worker.model.Model` with random weights."""

    def __init__(self, seed=0, vocabulary=VOCABULARY):
        from cupy import asarray

        from worker.gpu.layouts import BlockMatrix

        def matrix(rows, cols, scale):
            values = (rng.normal(size=(rows, cols)) * scale).astype(np.float32)
            return QTensor("x", (rows, cols), F32, BlockMatrix(F32, (asarray(values), None, None, None)))

        rng = np.random.default_rng(seed)
        self.hp = Hparams("x", 1, DIM, 8, 1, 1, DIM, vocabulary, CONTEXT, 1e-5, 1e4, DIM, RopeScaling())
        self.table = matrix(vocabulary, vocabulary, 1.5)
        self.table.data.planes[0][BROKEN] = np.nan
        self.projections = [matrix(vocabulary, DIM, 1) for _ in range(3)]
        self.out = Linear(matrix(vocabulary, DIM, 1))
        self.spec = Attention(0, 1, 1, DIM, Rope(0.7 ** np.arange(DIM // 2), CONTEXT))
        self.layers = [SimpleNamespace(attention=self.spec)]

    def forward(self, ops, batch):
        x = ops.embed(self.table, batch)
        y = ops.attention(*(ops.embed(each, batch) for each in self.projections), self.spec, batch)
        logits = ops.linear_add(ops.gather_rows(y, batch), self.out, ops.gather_rows(x, batch))
        return getattr(logits, "x", logits)


def chain_runner(kernels, memory, slots, *, vocabulary=VOCABULARY, **settings):
    """A runner of the chain; id 95 is never drawn unless it is forced."""
    from worker.gpu.runner import GpuRunner, GpuSettings

    chain = Chain(vocabulary=vocabulary)
    chosen = GpuSettings(**{"kv_blocks": BLOCKS, "context": CONTEXT, "prefill_tokens": 64, "slots": slots, **settings})
    return GpuRunner(chain, chain.hp, memory, kernels, chosen, padding_ids=[BROKEN])
