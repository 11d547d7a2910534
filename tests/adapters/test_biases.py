"""Biases of projections, and q, k and v in one tensor: the log-probabilities of llama.cpp."""

from __future__ import annotations

import pytest

from tests.adapters.variants import LLAMA_PARTS, assert_as_llama_cpp, biases, fused, logprobs, vectors
from tests.changed_files import changed_copy
from tests.tiny_models import TINY


@pytest.mark.parametrize("parts", [*((part,) for part in LLAMA_PARTS), LLAMA_PARTS[:4], LLAMA_PARTS[4:], LLAMA_PARTS])
def test_each_bias_of_a_llama_file_is_added(parts, exact, tmp_path):
    source = exact("llama")
    path = changed_copy(source, tmp_path / "biased.gguf", tensors=biases("llama", *parts))
    assert_as_llama_cpp(path, unlike=None if parts == ("attn_k",) else source)


@pytest.mark.parametrize("part", ["attn_q", "attn_k", "attn_v"])
def test_each_bias_of_a_qwen2_file_is_optional(part, exact, tmp_path):
    drop = [f"blk.{i}.{part}.bias" for i in range(2)]
    assert_as_llama_cpp(changed_copy(exact("qwen2"), tmp_path / "q.gguf", drop=drop))


@pytest.mark.parametrize("name", ["qwen2", "qwen2-untied"])
def test_the_output_bias_of_a_qwen2_file_is_added_to_the_logits(name, exact, tmp_path):
    source = exact(name)
    bias = vectors(0, **{"output.bias": TINY[name].vocab})
    assert_as_llama_cpp(changed_copy(source, tmp_path / "q.gguf", tensors=bias), unlike=source)


def test_the_bias_of_phi3s_fused_projection_is_added(exact, tmp_path):
    source = exact("phi3")
    assert_as_llama_cpp(changed_copy(source, tmp_path / "p.gguf", tensors=biases("phi3", "attn_qkv")), unlike=source)


@pytest.mark.parametrize("biased", [False, True])
def test_q_k_and_v_may_be_one_tensor(biased, exact, tmp_path):
    whole, parts = fused(exact("llama"), "llama")
    tensors = whole | (biases("llama", "attn_qkv") if biased else {})
    path = changed_copy(exact("llama"), tmp_path / "fused.gguf", tensors=tensors, drop=parts)
    assert_as_llama_cpp(path, unlike=exact("llama") if biased else None)
    if not biased:
        assert (logprobs(path) == logprobs(exact("llama"))).all()
