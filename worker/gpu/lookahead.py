"""A draw on its way to the host, and the step that was launched before anyone asked for it. Next: `runner.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from worker.gpu.sampler import unpack
from worker.ops import Batch
from worker.sampling import Draw, DrawRequest


@dataclass(frozen=True, slots=True)
class Result:
    """A draw on its way to the host: `raw` holds it once `event` has happened."""

    raw: np.ndarray[Any, Any]
    event: Any

    def draw(self, request: DrawRequest) -> Draw:
        """Wait for it."""
        self.event.synchronize()
        return unpack(self.raw, request)


@dataclass(frozen=True, slots=True)
class Lookahead:
    """A decode step that was launched before anyone asked for it, and what the call must be that asks for it."""

    batch: Batch
    request: DrawRequest
    result: Result

    def answers(self, batch: Batch, request: DrawRequest) -> bool:
        """Whether the call is the one foreseen: the same sequence's next token, drawn the same way.

        A sequence's list of generated ids is one object for its whole life, so it tells sequences apart.
        """
        return (
            request.generated is self.request.generated
            and request.sampling == self.request.sampling
            and request.index == self.request.index
            and request.forced is None
            and np.array_equal(batch.tokens, self.batch.tokens)
            and np.array_equal(batch.positions, self.batch.positions)
            and np.array_equal(batch.block_tables[0], self.batch.block_tables[0])
        )
