"""Files of Mistral 3 and later: the log-probabilities of llama.cpp, or a refusal."""

from __future__ import annotations

import math

import pytest

from tests.adapters.variants import LLAMA_PARTS, assert_as_llama_cpp, biases, logprobs, refusal
from tests.changed_files import changed_copy
from worker import adapters
from worker.gguf_file import GgufFile
from worker.model import ModelOptions
from worker.ops import PositionScale


@pytest.mark.parametrize(
    "keys",
    [
        {"scaling.yarn_log_multiplier": 0.0},
        {"scaling.yarn_log_multiplier": 0.5},
        {"scaling.yarn_beta_fast": 4.0, "scaling.original_context_length": 128},
        {"scaling.yarn_beta_slow": 2.0},
        {"scaling.attn_factor": 1.25},
        {"scaling.factor": 4.0},
        {"scaling.type": "none"},
        {"scaling.type": "linear"},
        {"scaling.type": None, "scaling.factor": None},
    ],
)
@pytest.mark.parametrize("name", ["mistral3", "mistral3-experts"])
def test_rope_keys_of_a_mistral3_file_are_applied(name, keys, exact, tmp_path):
    metadata = {f"mistral3.rope.{key}": value for key, value in keys.items()}
    path = changed_copy(exact(name), tmp_path / "m.gguf", metadata=metadata)
    no_change = name == "mistral3-experts" and keys == {"scaling.yarn_log_multiplier": 0.0}  # its file has none
    assert_as_llama_cpp(path, unlike=None if no_change else exact(name))


@pytest.mark.parametrize("parts", [LLAMA_PARTS[:4], LLAMA_PARTS])
def test_biases_of_a_mistral3_file_are_added(parts, exact, tmp_path):
    path = changed_copy(exact("mistral3"), tmp_path / "m.gguf", tensors=biases("mistral3", *parts))
    assert_as_llama_cpp(path, unlike=exact("mistral3"))


@pytest.mark.parametrize("value", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("name", ["mistral3", "mistral3-experts"])
def test_the_attention_temperature_of_a_mistral3_file_is_applied(name, value, exact, tmp_path):
    """The prompt's last tokens are beyond the original context of 4."""
    changes = {"attention.temperature_scale": value, "rope.scaling.original_context_length": 4}
    metadata = {f"mistral3.{key}": changed for key, changed in changes.items()}
    path = changed_copy(exact(name), tmp_path / "m.gguf", metadata=metadata)
    plain = changed_copy(path, tmp_path / "plain.gguf", metadata={"mistral3.attention.temperature_scale": None})
    assert_as_llama_cpp(path, unlike=plain if value else exact(name))


def test_the_attention_temperature_changes_no_bit_within_the_original_context(exact, tmp_path):
    key = "mistral3.attention.temperature_scale"
    path, plain = (
        changed_copy(exact("mistral3"), tmp_path / f"{value}.gguf", metadata={key: value}) for value in (0.5, None)
    )
    assert (logprobs(path) == logprobs(plain)).all()
    with GgufFile.open(path) as file:
        (model, _), (beyond, _) = (adapters.bind(file, ModelOptions(context)) for context in (24, 25))
    assert {layer.attention.query_scale for layer in model.layers} == {None}
    assert {layer.attention.query_scale for layer in beyond.layers} == {PositionScale(0.5, 24)}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.scaling.yarn_log_multiplier", -1.0),
        ("rope.scaling.yarn_log_multiplier", math.inf),
        ("attention.temperature_scale", -0.1),
        ("attention.temperature_scale", math.nan),
        ("attention.temperature_length", 64),
        ("attention.scale", 0.05),
        ("rope.scaling.alpha", 2.0),
        ("expert_shared_count", 1),
    ],
)
def test_mistral3_keys_that_are_not_handled_are_refused_by_name(key, value, exact, tmp_path):
    path = changed_copy(exact("mistral3"), tmp_path / "m.gguf", metadata={f"mistral3.{key}": value})
    assert f"mistral3.{key}" in refusal(path)


def test_the_log_multiplier_of_yarn_is_refused_in_a_llama_file(exact, tmp_path):
    """llama.cpp ignores it there, which is not what the model was trained with."""
    key = "llama.rope.scaling.yarn_log_multiplier"
    assert key in refusal(changed_copy(exact("mistral"), tmp_path / "m.gguf", metadata={key: 1.0}))
