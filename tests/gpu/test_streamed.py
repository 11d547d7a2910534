"""The streamed references compared with the twins, with weights on the host (no GPU)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.goldens import relative_error
from tests.gpu import streamed
from tests.gpu.loaded import rounding_twin
from tests.gpu.trail import Trail, Trailed
from tests.models import cpu_runner, decode, prefill

PROMPT = np.random.default_rng(2).integers(0, 280, 50).tolist()
NAMES = ("gpt-oss", "phi3", "qwen2", "qwen3", "qwen3moe", "gemma3", "gemma4", "granite", "smollm3", "mistral3")
TABLE = np.arange(8, dtype=np.int32)
BATCHES = [prefill(PROMPT, table=TABLE, rows=[0, 49]), decode(7, 50, TABLE), decode(9, 51, TABLE)]
ORDER_OF_SUMS, ROUNDING_BOUNDARY, NEAR_TIE = 1e-5, 2e-3, 1e-3


class HostRows(streamed.DeviceRows):
    """Weights that are already on the host."""

    def __init__(self):
        super().__init__(None, None)

    def fetch(self, matrix):
        return matrix.data

    def vector(self, tensor):
        return tensor.data

    def expert(self, weight, expert):
        return replace(weight, shape=weight.shape[1:], data=weight.data[expert])


@pytest.mark.parametrize(
    ("name", "rounds"),
    [
        *((name, rounds) for rounds in (False, True) for name in NAMES),
        ("gemma4-experts", False),  # a value at a boundary of 8 bits moves its logits by 1e-2
    ],
)
def test_a_reference_that_follows_a_twin_s_trail_gives_the_twin_s_logits(name, rounds, tiny, monkeypatch):
    monkeypatch.setattr(streamed, "SLAB", 40_000)  # several slabs a matrix, the last one shorter
    twin, exact = rounding_twin(tiny(name)), cpu_runner(tiny(name))
    walker = twin if rounds else exact
    ops = walker._ops
    with HostRows() as rows:
        references = streamed.References(exact._model, rows, blocks=32)
        for batch in BATCHES:
            trail = Trail()
            walker._ops = {batch.phase: Trailed(ops[batch.phase], trail)}
            references.set_cache(twin.cache.k, twin.cache.v)
            logits, answers = walker.logits(batch), references.answers(batch, trail)
            if not rounds:
                assert relative_error(answers.exact, logits) < ORDER_OF_SUMS
                continue
            assert relative_error(answers.twin, logits) < ROUNDING_BOUNDARY
            assert relative_error(answers.led, logits) < ROUNDING_BOUNDARY
            assert len(answers.halves) == 2 * len(exact._model.layers)
            assert max(answers.halves) < ROUNDING_BOUNDARY
            assert answers.tie < NEAR_TIE
