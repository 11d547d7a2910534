"""llama.cpp's GELU, a table of f16 values on the CPU, for comparisons of models that have it.

The worker's log-probabilities are compared with that table in place of its GELU, and without it
within what f16 changes.
"""

from __future__ import annotations

import numpy as np

from tests.llama_cpp import LlamaCpp
from tests.models import cpu_runner, prefill
from worker.cpu import ops
from worker.cpu.plain import gated

PROMPT = [(37 * i + 5) % 250 for i in range(90)]  # longer than the windows
F16_BOUND = 5e-3


def gated_by_table(gate, up, activation):
    """GELU(gate)·up with gate and GELU rounded to f16; gates beyond ±10 are 0 or themselves."""
    rounded = gate.astype(np.float16).astype(np.float32)
    looked_up = gated(rounded, np.ones_like(up), activation).astype(np.float16).astype(np.float32)
    return np.where(np.abs(gate) < 10, looked_up, np.maximum(gate, 0)) * up


def logprobs_of(path):
    """The worker's log-probabilities after `PROMPT`."""
    logits = cpu_runner(path, context=512).logits(prefill(PROMPT, rows=[len(PROMPT) - 1]))[0].astype(np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def assert_as_llama_cpp(path, monkeypatch, bound=1e-3):
    """The top 20 after `PROMPT` are those of llama.cpp; `bound` is of both with that table."""
    with LlamaCpp(path, context=512) as llama_cpp:
        expected = dict(llama_cpp.next_logprobs(PROMPT))
    found = logprobs_of(path)
    assert max(abs(found[token] - logprob) for token, logprob in expected.items()) < F16_BOUND
    with monkeypatch.context() as patched:
        patched.setattr(ops, "gated", gated_by_table)
        found = logprobs_of(path)
    assert max(abs(found[token] - logprob) for token, logprob in expected.items()) < bound
