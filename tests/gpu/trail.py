"""What a forward did on its device, for a reference to follow: the experts it chose, its residual stream.

A mixture of random experts is chaotic: f32 with an f16 cache already sends some token to another expert, and a few
layers on nothing is alike. So references take the experts that the GPU chose, and tell how near a tie its choice was.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from worker.ops import Phase


@dataclass
class Trail:
    """Of each layer in turn: `experts` [T, k] i32, `residuals` [T, d] f32 after each half; the last's are [R, …]."""

    experts: list[np.ndarray] = field(default_factory=list)
    residuals: list[np.ndarray] = field(default_factory=list)


class Trailed:
    """Any device's ops, which leave a trail."""

    def __init__(self, ops: Any, trail: Trail) -> None:
        self._ops = ops
        self._trail = trail

    def __getattr__(self, name):
        return getattr(self._ops, name)

    def norm_route(self, *given):
        n, routes = self._ops.norm_route(*given)
        self._trail.experts.append(on_host(routes.experts))
        return n, routes

    def linear_add(self, *given):
        return self._left(self._ops.linear_add(*given))

    def experts_add(self, *given):
        return self._left(self._ops.experts_add(*given))

    def _left(self, x):
        self._trail.residuals.append(on_host(x))
        return x


def on_host(array):
    """A copy of an array of any device, or of the rows that prefill has taken of one."""
    array = getattr(array, "x", array)
    return array.get() if hasattr(array, "get") else array.copy()


class _TrailedModel:
    """A model whose forwards leave a trail."""

    def __init__(self, model, trail):
        self._model = model
        self._trail = trail

    def forward(self, ops, batch):
        return self._model.forward(Trailed(ops, self._trail), batch)


def logits_and_trail(runner, batch):
    """The logits [R, V] of a batch on the GPU's runner, launched kernel by kernel, and the trail of that forward."""
    trail, model = Trail(), runner._model
    runner._model = _TrailedModel(model, trail)
    try:
        return _launched(runner, batch), trail
    finally:
        runner._model = model


def _launched(runner, batch):
    """What a captured piece of a prompt does at once; a step of `runner.logits` is no graph anyway."""
    if batch.phase is Phase.DECODE:
        return runner.logits(batch)
    with runner._stream:
        runner._prompt.load(batch, runner._stream)
        return runner._prefill_forward(runner._kernels, runner._pools[batch.phase], len(batch.tokens)).get()
