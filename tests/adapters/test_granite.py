"""Files of Granite, with experts and without: the log-probabilities of llama.cpp, or a refusal."""

from __future__ import annotations

import math

import pytest

from tests.adapters.variants import LLAMA_PARTS, D, assert_as_llama_cpp, biases, logprobs, refusal
from tests.changed_files import changed_copy
from tests.tiny_models import TINY

GRANITE_SCALES = ("embedding_scale", "attention.scale", "residual_scale", "logit_scale")


@pytest.mark.parametrize("value", [0.0, 0.3, 1.7, None])
@pytest.mark.parametrize("key", GRANITE_SCALES)
def test_each_scale_of_a_granite_file_is_applied(key, value, exact, tmp_path):
    """Zero and a missing key mean no scale; the logit scale alone is required."""
    path = changed_copy(exact("granite"), tmp_path / "g.gguf", metadata={f"granite.{key}": value})
    if key == "logit_scale" and not value:
        assert "granite.logit_scale" in refusal(path)
    else:
        assert_as_llama_cpp(path, unlike=exact("granite"))


@pytest.mark.parametrize("keys", [{}, {"attention.scale": None}])
def test_a_granite_file_may_have_no_rope(keys, exact, tmp_path):
    metadata = {f"granite.{key}": value for key, value in ({"rope.scaling.finetuned": False} | keys).items()}
    assert_as_llama_cpp(changed_copy(exact("granite"), tmp_path / "g.gguf", metadata=metadata), unlike=exact("granite"))


def test_the_attention_scale_of_granite_multiplies_that_of_rope(exact, tmp_path):
    keys = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128}
    metadata = {f"granite.{key}": value for key, value in keys.items()}
    assert_as_llama_cpp(changed_copy(exact("granite"), tmp_path / "g.gguf", metadata=metadata), unlike=exact("granite"))


@pytest.mark.parametrize("name", ["granite", "granitemoe-shared"])
def test_keys_of_the_state_space_layers_that_a_granite_4_file_lacks_change_nothing(name, exact, tmp_path):
    """As the converter writes them for models whose layers all have attention."""
    shape = TINY[name]
    sizes = {"conv_kernel": 4, "state_size": 128, "group_count": 1, "inner_size": 512, "time_step_rank": 48}
    keys = {f"ssm.{key}": value for key, value in sizes.items()}
    keys |= {"attention.head_count_kv": [shape.kv_heads] * shape.layers, "rope.scaling.finetuned": True}
    metadata = {f"{shape.arch}.{key}": value for key, value in keys.items()}
    path = changed_copy(exact(name), tmp_path / "g.gguf", metadata=metadata)
    assert (logprobs(path) == logprobs(exact(name))).all()
    assert_as_llama_cpp(path)


@pytest.mark.parametrize("parts", [LLAMA_PARTS[3:4], LLAMA_PARTS[6:], LLAMA_PARTS])
def test_biases_of_a_granite_file_are_added_before_the_residual_scale(parts, exact, tmp_path):
    path = changed_copy(exact("granite"), tmp_path / "g.gguf", tensors=biases("granite", *parts))
    assert_as_llama_cpp(path, unlike=exact("granite"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in GRANITE_SCALES for value in (-1.0, math.nan, math.inf, 1e-30)),
        ("rope.dimension_count", D // 2),
        ("rope.scaling.finetuned", 1),
        ("expert_count", 8),
        ("expert_shared_feed_forward_length", 64),
        ("attention.temperature_scale", 0.1),
    ],
)
def test_granite_keys_that_are_not_handled_are_refused_by_name(key, value, exact, tmp_path):
    path = changed_copy(exact("granite"), tmp_path / "g.gguf", metadata={f"granite.{key}": value})
    assert f"granite.{key}" in refusal(path)


@pytest.mark.parametrize("key", GRANITE_SCALES)
@pytest.mark.parametrize("name", ["granitemoe", "granitemoe-shared"])
def test_each_scale_of_a_granite_file_with_experts_is_applied(name, key, exact, tmp_path):
    path = changed_copy(exact(name), tmp_path / "g.gguf", metadata={f"granitemoe.{key}": 1.7})
    assert_as_llama_cpp(path, unlike=exact(name))


@pytest.mark.parametrize("key", ["expert_count", "expert_used_count"])
def test_a_granite_file_with_experts_uses_some_of_them(key, exact, tmp_path):
    path = changed_copy(exact("granitemoe"), tmp_path / "g.gguf", metadata={f"granitemoe.{key}": 0})
    assert "granitemoe.expert_used_count" in refusal(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_gating_func", 2),
        ("expert_weights_scale", 2.5),
        ("expert_weights_norm", False),
        ("expert_shared_count", 1),
        ("expert_group_count", 2),
        ("interleave_moe_layer_step", 2),
        ("leading_dense_block_count", 1),
    ],
)
def test_granite_keys_of_experts_that_are_not_handled_are_refused_by_name(key, value, exact, tmp_path):
    path = changed_copy(exact("granitemoe"), tmp_path / "g.gguf", metadata={f"granitemoe.{key}": value})
    assert f"granitemoe.{key}" in refusal(path)


def test_shared_experts_of_granite_without_their_width_are_refused_by_name(exact, tmp_path):
    changes = {"granitemoe.expert_shared_feed_forward_length": None}
    path = changed_copy(exact("granitemoe-shared"), tmp_path / "g.gguf", metadata=changes)
    assert "blk.0.ffn_gate_shexp.weight" in refusal(path)
