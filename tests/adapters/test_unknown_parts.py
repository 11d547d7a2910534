"""Tensors and keys that no adapter handles: refused by name, or without effect on any bit."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from tests.adapters.variants import CONTEXT, D, assert_as_llama_cpp, logprobs, refusal
from tests.changed_files import changed_copy
from tests.tiny_models import TINY
from worker import adapters
from worker.gguf_file import GgufFile
from worker.model import ModelOptions


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        *(("llama", tensor) for tensor in ("output.bias", "blk.0.attn_q_norm.weight", "blk.2.attn_norm.weight")),
        *(("llama", tensor) for tensor in ("blk.0.attn_norm.bias", "blk.0.attn_q.scale", "blk.0.unknown.weight")),
        *(
            ("llama", tensor)
            for tensor in ("rope_factors_long.weight", "token_types.weight", "blk.0.attn_sinks.weight")
        ),
        *(("qwen2", tensor) for tensor in ("blk.0.attn_output.bias", "blk.1.ffn_down.bias", "blk.1.attn_qkv.bias")),
        *(("phi3", tensor) for tensor in ("output.bias", "blk.0.attn_output.bias", "blk.0.ffn_up.bias")),
        *(("gpt-oss", tensor) for tensor in ("output.bias", "blk.0.ffn_norm.weight", "blk.0.post_ffw_norm.weight")),
    ],
)
def test_a_tensor_that_the_architecture_does_not_use_is_refused_by_name(name, tensor, exact, tmp_path):
    path = changed_copy(exact(name), tmp_path / "x.gguf", tensors={tensor: np.ones(D)})
    assert repr(tensor) in refusal(path)


HARMLESS = ("v.blk.0.attn_q.weight", "mm.0.weight", "a.blk.0.ln.weight", "blk.0.attn_rot_embd.weight")


@pytest.mark.parametrize("tensor", [*HARMLESS, "blk.0.attn_q.input_scale", "blk.0.attn.rotary_emb.inv_freq"])
def test_a_tensor_that_changes_nothing_is_reported_as_unused(tensor, exact, tmp_path):
    path = changed_copy(exact("llama"), tmp_path / "x.gguf", tensors={tensor: np.full(D // 2, 7)})
    with GgufFile.open(path) as file:
        assert adapters.bind(file, ModelOptions(CONTEXT))[1].unused() == [tensor]
    assert (logprobs(path) == logprobs(exact("llama"))).all()


CHANGING_KEYS = {
    "attention.scale": 0.5,
    "attention.causal": False,
    "attention.clamp_kqv": 8.0,
    "attention.key_length_swa": 32,
    "attention.max_alibi_bias": 8.0,
    "attention.sliding_window": 16,
    "attention.sliding_window_pattern": 2,
    "attention.temperature_scale": 0.1,
    "attn_logit_softcapping": 50.0,
    "embedding_scale": 12.0,
    "expert_count": 8,
    "expert_shared_count": 1,
    "expert_used_count": 2,
    "expert_weights_scale": 2.5,
    "final_logit_softcapping": 30.0,
    "interleave_moe_layer_step": 2,
    "logit_scale": 16.0,
    "nextn_predict_layers": 1,
    "residual_scale": 0.22,
    "rope.dimension_sections": [16, 24, 24, 0],
    "rope.freq_base_swa": 1e4 + 1,
    "rope.scaling.alpha": 1000.0,
    "rope.scaling.factor": -2.0,
    "rope.scaling.type": "longrope",
    "rope.scaling.yarn_attn_factor": 2.0,
    "rope.scaling.yarn_ext_factor": 0.5,
    "rope.scaling.yarn_log_multiplier": 0.1,
    "rope.unknown": 3,
    "swiglu_clamp_exp": [7.0, 7.0],
    "tensor_data_layout": "another",
    "attention.head_count_kv": [2, 1],
    "attention.head_count": [4, 2],
    "feed_forward_length": [512, 256],
}


CHANGED = set(itertools.product(("llama", "qwen2", "phi3"), CHANGING_KEYS)) - {("phi3", "attention.sliding_window")}
"""Phi-3's window is applied as `model.sliding_window` says."""


@pytest.mark.parametrize(("name", "key"), sorted(CHANGED))
def test_a_key_that_changes_the_computation_and_is_not_handled_is_refused_by_name(name, key, exact, tmp_path):
    full = f"{TINY[name].arch}.{key}"
    path = changed_copy(exact(name), tmp_path / "x.gguf", metadata={full: CHANGING_KEYS[key]})
    expected = {"rope.scaling.type": "rope_factors_long", "expert_count": ".expert_"}.get(key, full)
    assert expected in refusal(path)


NEUTRAL_KEYS = {
    "attention.scale": 1 / math.sqrt(D),
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.layer_norm_epsilon": 1e-5,
    "attention.sliding_window": 512,
    "attn_logit_softcapping": 0.0,
    "embedding_scale": 1.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "expert_weights_scale": 1.0,
    "logit_scale": 1.0,
    "pooling_type": 1,
    "residual_scale": 1.0,
    "tensor_data_layout": "Meta AI original pth",
    "use_parallel_residual": True,
    "vocab_size": 100,
    "attention.head_count_kv": [2, 2],
    "attention.head_count": [4, 4],
    "feed_forward_length": [512, 512],
    "rope.scaling.original_context_length": 0,
}


@pytest.mark.parametrize("key", NEUTRAL_KEYS)
def test_a_neutral_value_changes_nothing(key, exact, tmp_path):
    path = changed_copy(exact("llama"), tmp_path / "n.gguf", metadata={f"llama.{key}": NEUTRAL_KEYS[key]})
    assert (logprobs(path) == logprobs(exact("llama"))).all()
    assert_as_llama_cpp(path)


@pytest.mark.parametrize("key", ["general.description", "other.attention.scale", "qwen2.rope.scale_linear"])
def test_keys_outside_the_architecture_change_nothing(key, exact, tmp_path):
    path = changed_copy(exact("llama"), tmp_path / "n.gguf", metadata={key: b"\xff" if "general" in key else 4.0})
    assert (logprobs(path) == logprobs(exact("llama"))).all()


@pytest.mark.parametrize("kind", ["imatrix", "adapter", "mmproj"])
def test_a_file_of_another_kind_is_refused_with_that_reason(kind, exact, tmp_path):
    path = changed_copy(exact("llama"), tmp_path / "k.gguf", metadata={"general.type": kind})
    assert repr(kind) in refusal(path)
