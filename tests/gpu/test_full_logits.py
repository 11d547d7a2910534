"""Whole-model logits at full size, compared with the CPU twin and with f32.

The references read their weights from the device (`streamed.py`), so a separate test compares those
with the file.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest

from tests.gpu.full import CONTEXT, random_ids, relative
from tests.gpu.streamed import DeviceRows, References
from tests.gpu.trail import logits_and_trail
from tests.models import decode, prefill
from worker.adapters import bind
from worker.adapters.weights import describe
from worker.gguf_file import GgufFile
from worker.model import ModelOptions
from worker.ops import QTensor
from worker.quants import dequantize

TWIN, REFERENCE, NEAR_TIE = 0.01, 0.05, 1e-3
PROMPT_TWIN = 0.02
"""For a whole prompt: values that round to another f16 add up over the layers, to 1.3 % after 36."""


@pytest.fixture
def rows(kernels, memory):
    with DeviceRows(kernels, memory) as made:
        yield made


def test_the_device_holds_the_files_values(full, rows):
    """Compare each matrix's first and last row, and rows at upload chunk boundaries, bitwise."""
    from worker.gpu.upload import CHUNK

    compared, model = 0, full.loaded.engine._runner._model
    with GgufFile.open(full.path) as file:
        factors = vector_factors(file)
        for tensor in held(model):
            name, _, part = tensor.name.partition("[")
            info = file.tensors[name]
            if not hasattr(tensor.data, "planes"):
                expected = dequantize(file.data(info), info.kind) * np.float32(factors[name])
                assert rows.vector(tensor).tobytes() == expected.tobytes(), name
                continue
            blocks = file.data(info).reshape(-1, info.kind.row_bytes(info.shape[-1]))
            first = int(part.removeprefix(":, ").partition(":")[0] or 0)
            height, in_file = tensor.shape[-2], info.shape[-2]  # rows of one expert, or all of a dense matrix
            flat = flattened(tensor)
            ends = range(CHUNK // blocks.shape[1], flat.shape[0], max(1, CHUNK // blocks.shape[1]))
            for row in {0, flat.shape[0] - 1, *ends, *(end - 1 for end in ends)}:
                expected = dequantize(blocks[row // height * in_file + first + row % height][None], info.kind)
                assert rows.fetch(flat.rows(row, row + 1)).tobytes() == expected.tobytes(), (tensor.name, row)
                compared += 1
    assert compared >= 2 * len(model.layers)


def vector_factors(file):
    """The factor by which the adapter scales each tensor at its upload, by name."""
    factors = {}

    def record(info, scale=1.0):
        factors[info.name] = scale
        return describe(info)

    bind(file, ModelOptions(CONTEXT), record)
    return factors


def held(value):
    """Every tensor of a model, in whatever attribute its adapter stores it."""
    if isinstance(value, QTensor):
        yield value
        return
    parts = value if isinstance(value, list | tuple) else [getattr(value, name) for name in names_in(value)]
    for part in parts:
        yield from held(part)


def names_in(value):
    return getattr(value, "__dataclass_fields__", None) or getattr(value, "__dict__", ())


def flattened(matrix):
    """A matrix of experts [E, rows, cols] as one [E·rows, cols]; other matrices unchanged."""
    planes = tuple(None if plane is None else plane.reshape(-1, plane.shape[-1]) for plane in matrix.data.planes)
    shape = math.prod(matrix.shape[:-1]), matrix.shape[-1]
    return replace(matrix, shape=shape, data=replace(matrix.data, planes=planes))


def test_logits_of_100_tokens_and_3_steps_equal_the_twins_and_the_references(full, rows, record_property):
    """Compare a prompt with the twin (2 %) and f32 (5 %), and steps half a layer at a time.

    With 8-bit activations a step is chaotic: a last bit that crosses a rounding boundary becomes
    percents some layers later. Each half of a layer is therefore compared with the twin's from the
    GPU's own inputs, and the whole step must be no further from f32 than the twin is.
    """
    began, table, steps = time.perf_counter(), np.arange(8, dtype=np.int32), {}
    batches = {"prefill": prefill(random_ids(full, 100), table=table, rows=[99])}
    batches |= {f"step {i}": decode(t, 100 + i, table) for i, t in enumerate(random_ids(full, 3, seed=1))}
    runner = full.loaded.engine._runner
    references = References(runner._model, rows)
    for name, batch in batches.items():
        references.set_cache(*first_blocks(runner.cache, len(references.caches[0].k)))
        logits, trail = logits_and_trail(runner, batch)
        assert np.array_equal(logits, runner.logits(batch)), "the graph gives the logits of single launches"
        steps[name] = Distances.of(logits, references.answers(batch, trail))
    summary = "; ".join(f"{name} {each}" for name, each in steps.items())
    record_property(f"{full.name} logits", f"{summary}; {time.perf_counter() - began:.0f} s")
    assert steps["prefill"].from_twin < PROMPT_TWIN
    for each in steps.values():
        assert each.from_f32 < max(REFERENCE, 1.5 * each.twins_from_f32)
        assert max(each.worst_half, each.head) < TWIN
        assert each.tie < NEAR_TIE


@dataclass
class Distances:
    """Distances of logits from the references', and the worst distances of the guided run."""

    from_twin: float
    from_f32: float
    twins_from_f32: float
    worst_half: float
    head: float
    tie: float

    @classmethod
    def of(cls, logits, answers):
        exact, twin = answers.exact, answers.twin
        whole = relative(logits, twin), relative(logits, exact), relative(twin, exact)
        return cls(*whole, max(answers.halves), relative(logits, answers.led), answers.tie)

    def __str__(self):
        shares = self.from_twin, self.from_f32, self.twins_from_f32, self.worst_half, self.head
        twin, f32, twins, half, head = (f"{100 * share:.2f} %" for share in shares)
        tie = f", experts within {self.tie:.1e}" if self.tie else ""
        return (
            f"{twin} from the twin, {f32} from f32 (the twin {twins}); worst half of a layer {half}, head {head}{tie}"
        )


def first_blocks(cache, layers):
    """K and V of each layer's first 8 blocks in the CPU cache's layout: [8, B, Hk, D] each."""
    pairs = (cache.layer(layer) for layer in range(layers))
    return zip(*([part[:8].get().swapaxes(1, 2) for part in pair] for pair in pairs), strict=True)
