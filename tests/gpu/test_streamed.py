"""The streamed twins against those whose weights lie in memory; here both come from the host, so no GPU is needed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.goldens import relative_error
from tests.gpu import streamed
from tests.gpu.loaded import rounding_twin
from tests.models import cpu_runner, decode, prefill
from worker.adapters.hparams import read_hparams
from worker.gguf_file import GgufFile

PROMPT = np.random.default_rng(2).integers(0, 280, 50).tolist()
TABLE = np.arange(8, dtype=np.int32)
ORDER_OF_SUMS, ACROSS_A_ROUNDINGS_EDGE = 1e-5, 2e-3


class HostRows(streamed.DeviceRows):
    """Weights that lie on the host already."""

    def __init__(self):
        super().__init__(None, None)

    def fetch(self, matrix):
        return matrix.data

    def vector(self, tensor):
        return tensor.data

    def expert(self, weight, expert):
        return replace(weight, shape=weight.shape[1:], data=weight.data[expert])


@pytest.mark.parametrize("name", ["gpt-oss", "phi3", "qwen2"])
def test_streamed_weights_give_the_twins_logits(name, tiny, monkeypatch):
    monkeypatch.setattr(streamed, "SLAB", 40_000)  # several slabs a matrix, the last one shorter
    exact, rounding = cpu_runner(tiny(name)), rounding_twin(tiny(name))
    batches = [prefill(PROMPT, table=TABLE, rows=[0, 49]), decode(7, 50, TABLE), decode(9, 51, TABLE)]
    bounds = ORDER_OF_SUMS, ACROSS_A_ROUNDINGS_EDGE
    with GgufFile.open(tiny(name)) as file, HostRows() as rows:
        pair = streamed.references(exact._model, read_hparams(file), rows, blocks=32)
        for expected, found, bound in zip((exact, rounding), pair, bounds, strict=True):
            for batch in batches:
                found.cache.k[:], found.cache.v[:] = expected.cache.k, expected.cache.v
                assert relative_error(found.logits(batch), expected.logits(batch)) < bound
