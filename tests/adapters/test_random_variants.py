"""Random combinations of biases, RoPE keys and a fused q, k and v, as llama.cpp computes them."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.adapters.variants import LLAMA_PARTS, assert_as_llama_cpp, biases, fused
from tests.changed_files import changed_copy
from tests.tiny_models import TINY


def random_change(rng, name, exact):
    """A random set of biases, RoPE keys and a form of q, k and v: arguments of `changed_copy`."""
    arch, parts = TINY[name].arch, {"llama": LLAMA_PARTS, "phi3": ("attn_qkv",), "qwen2": ()}[TINY[name].arch]
    keys = {
        "rope.scaling.type": [None, "none", "linear", "yarn"],
        "rope.scaling.factor": [None, 0.0, 1.0, 2.5, 8.0],
        "rope.scale_linear": [None, None, 3.0],
        "rope.scaling.attn_factor": [None, 1.0, 0.8],
        "rope.scaling.original_context_length": [None, 64, 1024],
        "rope.freq_base": [1e4, 5e5],
        "attention.causal": [None, True],
        "logit_scale": [None, 1.0],
    }
    metadata = {f"{arch}.{key}": values[rng.integers(len(values))] for key, values in keys.items()}
    tensors = biases(name, *(part for part in parts if rng.integers(2)))
    drop = [f"blk.{i}.attn_{part}.bias" for i in range(2) for part in "qkv" if arch == "qwen2" and rng.integers(2)]
    if name == "llama" and rng.integers(2):
        whole, separate = fused(exact(name), name)
        tensors = whole | {each: value for each, value in tensors.items() if not re.search(r"attn_[qkv]\.", each)}
        drop += separate
    return {"metadata": metadata, "tensors": tensors, "drop": drop}


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", ["llama", "llama3-rope", "qwen2", "qwen2-untied", "phi3"])
def test_random_combinations_are_computed_as_llama_cpp_does(name, seed, exact, tmp_path):
    change = random_change(np.random.default_rng(seed), name, exact)
    print(change["metadata"], list(change["tensors"]), change["drop"])
    assert_as_llama_cpp(changed_copy(exact(name), tmp_path / "r.gguf", **change))
