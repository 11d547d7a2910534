"""RoPE keys and factors: the log-probabilities of llama.cpp."""

from __future__ import annotations

import numpy as np
import pytest

from tests.adapters.variants import D, assert_as_llama_cpp, logprobs
from tests.changed_files import changed_copy
from tests.tiny_models import TINY

FACTORS = {
    "rope_factors_long.weight": 1.0 + 0.125 * np.arange(D // 2),
    "rope_factors_short.weight": 1.0 + 0.0625 * np.arange(D // 2),
}


@pytest.mark.parametrize(
    "keys",
    [
        {"scale_linear": 4.0},
        {"scaling.factor": 4.0},
        {"scaling.factor": 4.0, "scaling.type": "linear"},
        {"scaling.factor": 4.0, "scale_linear": 2.0},
        {"scaling.attn_factor": 1.5},
        {"scaling.attn_factor": 1.5, "scaling.type": "none"},
        {"scaling.attn_factor": 1.5, "scaling.type": "linear", "scaling.factor": 2.0},
        {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 128},
        {
            "scaling.type": "yarn",
            "scaling.factor": 4.0,
            "scaling.original_context_length": 128,
            "scaling.attn_factor": 1.25,
        },
    ],
)
@pytest.mark.parametrize("name", ["llama", "llama3-rope", "qwen2", "phi3"])
def test_rope_keys_are_applied(name, keys, exact, tmp_path):
    arch = TINY[name].arch
    metadata = {f"{arch}.rope.{key}": value for key, value in keys.items()}
    assert_as_llama_cpp(changed_copy(exact(name), tmp_path / "r.gguf", metadata=metadata), unlike=exact(name))


@pytest.mark.parametrize(
    "keys",
    [
        {"scaling.factor": 0.0},
        {"scaling.factor": 0.0, "scale_linear": 4.0},
        {"scaling.factor": 4.0, "scaling.type": "none"},
        {"scale_linear": 4.0, "scaling.type": "none"},
        {"scaling.finetuned": True},
        {"scaling.alpha": 0.0},
        {"scaling.yarn_ext_factor": 1.0},
        {"dimension_sections": [0, 0, 0, 0]},
        {"freq_base_swa": 1e5},
    ],
)
def test_rope_keys_that_change_nothing_are_accepted(keys, exact, tmp_path):
    metadata = {f"llama.rope.{key}": value for key, value in keys.items()}
    path = changed_copy(exact("llama"), tmp_path / "r.gguf", metadata=metadata)
    assert (logprobs(path) == logprobs(exact("llama"))).all()
    assert_as_llama_cpp(path)


@pytest.mark.parametrize("keys", [{}, {"attn_factor": 1.2}, {"factor": 2.0}, {"original_context_length": 512}])
def test_longrope_factors_of_a_llama_file_are_applied(keys, exact, tmp_path):
    scaling = {"type": "longrope", "original_context_length": 128, **keys}
    metadata = {f"llama.rope.scaling.{key}": value for key, value in scaling.items()}
    path = changed_copy(exact("llama"), tmp_path / "l.gguf", metadata=metadata, tensors=FACTORS)
    assert_as_llama_cpp(path, unlike=exact("llama"))


@pytest.mark.parametrize("kind", [None, "longrope", "linear"])
@pytest.mark.parametrize("keys", [{}, {"attn_factor": None}, {"factor": 2.0}])
def test_phi3s_longrope_factors_are_applied_with_the_other_keys(kind, keys, exact, tmp_path):
    metadata = {f"phi3.rope.scaling.{key}": value for key, value in ({"type": kind} | keys).items()}
    assert_as_llama_cpp(changed_copy(exact("phi3-longrope"), tmp_path / "l.gguf", metadata=metadata))
