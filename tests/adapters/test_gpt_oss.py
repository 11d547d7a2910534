"""Files of gpt-oss: the log-probabilities of llama.cpp, or a refusal that names the key."""

from __future__ import annotations

import pytest

from tests.adapters.variants import assert_as_llama_cpp, refusal
from tests.changed_files import changed_copy

# llama.cpp rounds YaRN's bounds, and scales windowed layers even if the type is "none".
NO_YARN = {
    "gpt-oss.rope.scaling.type": None,
    "gpt-oss.rope.scaling.factor": None,
    "gpt-oss.attention.sliding_window": 3,
}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"rope.freq_base_swa": 1e4},
        {"attention.sliding_window_pattern": 3},
        {"attention.sliding_window_pattern": [False, True, True]},
        {"attention.sliding_window_pattern": [True, True, True]},
    ],
)
def test_gpt_oss_windows_and_their_rope_base_are_those_of_the_file(keys, exact, tmp_path):
    metadata = NO_YARN | {f"gpt-oss.{key}": value for key, value in keys.items()}
    assert_as_llama_cpp(changed_copy(exact("gpt-oss"), tmp_path / "g.gguf", metadata=metadata))


@pytest.mark.parametrize("part", ["attn_q", "attn_k", "attn_v"])
def test_gpt_oss_biases_of_q_k_and_v_are_optional(part, exact, tmp_path):
    drop = [f"blk.{i}.{part}.bias" for i in range(3)]
    assert_as_llama_cpp(changed_copy(exact("gpt-oss"), tmp_path / "g.gguf", metadata=NO_YARN, drop=drop))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.sliding_window", None),
        ("attention.sliding_window", 0),
        ("attention.sliding_window_pattern", 0),
        ("attention.sliding_window_pattern", [True, False]),
        ("expert_gating_func", 2),
        ("expert_weights_scale", 2.5),
        ("swiglu_clamp_exp", [1.0, 1.0, 1.0]),
        ("rope.scaling.type", "longrope"),
    ],
)
def test_gpt_oss_keys_that_are_not_handled_are_refused_by_name(key, value, exact, tmp_path):
    path = changed_copy(exact("gpt-oss"), tmp_path / "g.gguf", metadata={f"gpt-oss.{key}": value})
    assert f"gpt-oss.{key}" in refusal(path)
