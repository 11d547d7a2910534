"""Variants of the tiny models: their parts, log-probabilities against llama.cpp's, and refusals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.llama_cpp import LlamaCpp
from tests.models import cpu_runner, prefill
from tests.tiny_models import TINY
from worker import adapters
from worker.errors import ModelLoadFailed
from worker.gguf_file import GgufFile
from worker.model import ModelOptions

PROMPT = [*range(40, 46), 7, 120, 33, 60]
CONTEXT = 512
D = 64  # head width of the tiny models but phi3
LLAMA_PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def vectors(seed, **sizes):
    """Random vectors of these sizes by tensor name."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(size) * 0.5 for name, size in sizes.items()}


def biases(name, *parts):
    """A bias for each of `parts` in every layer."""
    shape = TINY[name]
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {"attn_q": q, "attn_k": kv, "attn_v": kv, "attn_qkv": q + 2 * kv}
    sizes |= {"ffn_gate": shape.ffn, "ffn_up": shape.ffn}
    wanted = {f"blk.{i}.{part}.bias": sizes.get(part, shape.width) for i in range(shape.layers) for part in parts}
    return vectors(len(parts), **wanted)


def fused(source, name):
    """The tensors that hold q, k and v of each layer in one, and the names that they replace."""
    with GgufFile.open(source) as file:
        parts = {f"blk.{i}": [f"blk.{i}.attn_{each}.weight" for each in "qkv"] for i in range(TINY[name].layers)}
        rows = {part: file.data(file.tensors[part]).view("<f4") for part in itertools.chain(*parts.values())}
        whole = {f"{block}.attn_qkv.weight": np.concatenate([rows[p] for p in each]) for block, each in parts.items()}
        return whole, list(rows)


def logprobs(path, *, context=CONTEXT):
    """The worker's log-probabilities after `PROMPT`."""
    logits = cpu_runner(path, context=context).logits(prefill(PROMPT, rows=[len(PROMPT) - 1]))[0].astype(np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def assert_as_llama_cpp(path, *, unlike=None):
    """The top 20 are those of llama.cpp; `unlike` is the file without the change, which must differ."""
    ours = logprobs(path)
    with LlamaCpp(path, context=CONTEXT) as llama_cpp:
        theirs = llama_cpp.next_logprobs(PROMPT)
    assert theirs[0][0] == ours.argmax()
    assert max(abs(ours[token] - logprob) for token, logprob in theirs) < 1e-3
    if unlike is not None:
        assert np.abs(ours - logprobs(unlike)).max() > 1e-2


def refusal(path, context=CONTEXT):
    """The message with which the file is refused."""
    with GgufFile.open(path) as file, pytest.raises(ModelLoadFailed) as failure:
        adapters.bind(file, ModelOptions(context))
    return failure.value.message
