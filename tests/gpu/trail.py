"""Record a forward's chosen experts and residual stream, for a reference to follow.

A mixture of random experts is chaotic: f32 with an f16 cache already routes some token to another
expert, and a few layers later all values differ. References therefore use the experts that the GPU
chose, and report how near to a tie each choice was.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from worker.cpu.plain import top_k
from worker.gpu.matvec import RouterLogits
from worker.ops import Phase


@dataclass
class Trail:
    """Per layer: `experts` [T, k] i32, `residuals` [T, d] f32 after each half."""

    experts: list[np.ndarray] = field(default_factory=list)
    residuals: list[np.ndarray] = field(default_factory=list)


class Trailed:
    """Ops of any device that record a trail."""

    def __init__(self, ops: Any, trail: Trail) -> None:
        self._ops = ops
        self._trail = trail

    def __getattr__(self, name):
        return getattr(self._ops, name)

    def norm_route(self, *args):
        n, routes = self._ops.norm_route(*args)
        self._trail.experts.append(_experts(routes))
        return n, routes

    def linear_add(self, y, linear, residual):
        x = self._ops.linear_add(y, linear, residual)
        return x if residual is None else self._recorded(x)

    def linear_norm_add(self, *args):
        return self._recorded(self._ops.linear_norm_add(*args))

    def experts_add(self, h, routes, down, residual):
        x = self._ops.experts_add(h, routes, down, residual)
        return x if residual is None else self._recorded(x)

    def branches_norm_add(self, *args):
        return self._recorded(self._ops.branches_norm_add(*args))

    def _recorded(self, x):
        self._trail.residuals.append(on_host(x))
        return x


def _experts(routes):
    """The chosen experts [T, k]; of a form without them, those of the highest logits."""
    if isinstance(routes, RouterLogits):
        return top_k(on_host(routes.logits), routes.k)[0]
    return on_host(routes.experts)


def on_host(array):
    """A host copy of an array of any device, or of a GatheredRows' array."""
    array = getattr(array, "x", array)
    return array.get() if hasattr(array, "get") else array.copy()


class _TrailedModel:
    """A model whose forwards record a trail."""

    def __init__(self, model, trail):
        self._model = model
        self._trail = trail

    def forward(self, ops, batch):
        return self._model.forward(Trailed(ops, self._trail), batch)


def logits_and_trail(runner, batch):
    """The logits [R, V] of a batch launched kernel by kernel, and the forward's trail."""
    trail, model = Trail(), runner._model
    runner._model = _TrailedModel(model, trail)
    try:
        logits = _logits(runner, batch)
    finally:
        runner._model = model
    for record in (trail.experts, trail.residuals):  # the last layer computes as many rows as the runner has logits
        record[:] = [each if len(each) == len(batch.tokens) else each[: len(batch.logit_rows)] for each in record]
    return logits, trail


def _logits(runner, batch):
    """Launch a chunk without its graph; `runner.logits` uses none for decode steps."""
    if batch.phase is Phase.DECODE:
        return runner.logits(batch)
    with runner._stream:
        runner._glu_bounds.launch(runner._kernels)
        runner._prefill_state.load([batch], runner._stream)
        logits = runner._prefill_forward(runner._kernels, runner._pools[batch.phase], len(batch.tokens))
        return logits[: len(batch.logit_rows)].get()
