"""Keys of experts that several architectures share: their width and the gate's function."""

from __future__ import annotations

import pytest

from tests.adapters.variants import assert_as_llama_cpp, logprobs, refusal
from tests.changed_files import changed_copy
from tests.tiny_models import TINY


@pytest.mark.parametrize("value", [1, 2, 3, 4])
def test_experts_of_qwen3_are_chosen_by_a_softmax_or_refused(value, exact, tmp_path):
    """2 is the sigmoid, 4 the root of the softplus; 1 and 3 are a softmax before and after the choice."""
    path = changed_copy(exact("qwen3moe"), tmp_path / "q.gguf", metadata={"qwen3moe.expert_gating_func": value})
    if value in (1, 3):
        assert_as_llama_cpp(path)
    else:
        assert "qwen3moe.expert_gating_func" in refusal(path)


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe", "gpt-oss"])
def test_the_width_of_experts_is_that_of_the_file_and_of_its_tensors(name, exact, tmp_path):
    key = f"{TINY[name].arch}.expert_feed_forward_length"
    width = TINY[name].expert_ffn or TINY[name].ffn
    same = changed_copy(exact(name), tmp_path / "same.gguf", metadata={key: width})
    assert (logprobs(same) == logprobs(exact(name))).all()
    other = changed_copy(exact(name), tmp_path / "other.gguf", metadata={key: width + 32})
    assert "ffn_gate_exps" in refusal(other)
    assert key in refusal(changed_copy(exact(name), tmp_path / "zero.gguf", metadata={key: 0}))


def test_the_width_of_experts_in_a_file_without_any_is_refused(exact, tmp_path):
    path = changed_copy(exact("llama"), tmp_path / "x.gguf", metadata={"llama.expert_feed_forward_length": 256})
    assert "llama.expert_feed_forward_length" in refusal(path)
