"""Unusual tensors and keys: the log-probabilities of llama.cpp, or a refusal that names them."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest

from tests.changed_files import changed_copy
from tests.llama_cpp import LlamaCpp
from tests.models import cpu_runner, prefill
from tests.tiny_models import TINY, make_tiny
from worker import adapters
from worker.errors import ModelLoadFailed
from worker.gguf_file import GgufFile
from worker.model import ModelOptions
from worker.ops import PositionScale

PROMPT = [*range(40, 46), 7, 120, 33, 60]
CONTEXT = 512
D = 64  # head width of the tiny models but phi3


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """A function from a model's name to its file with F32 weights, which llama.cpp multiplies exactly."""
    folder = tmp_path_factory.mktemp("exact")

    def path_of(name):
        path = folder / f"{name}.gguf"
        return path if path.exists() else make_tiny(name, path, quant="F32")

    return path_of


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


# --- biases ----------------------------------------------------------------------------------------------------------

LLAMA_PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


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


# --- RoPE ------------------------------------------------------------------------------------------------------------

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


# --- refusals --------------------------------------------------------------------------------------------------------


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


# --- gpt-oss ---------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("value", [1, 2, 3, 4])
def test_experts_of_qwen3_are_chosen_by_a_softmax_or_refused(value, exact, tmp_path):
    """2 is the sigmoid, 4 the root of the softplus; 1 and 3 are a softmax before and after the choice."""
    path = changed_copy(exact("qwen3moe"), tmp_path / "q.gguf", metadata={"qwen3moe.expert_gating_func": value})
    if value in (1, 3):
        assert_as_llama_cpp(path)
    else:
        assert "qwen3moe.expert_gating_func" in refusal(path)


# --- granite ---------------------------------------------------------------------------------------------------------

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


# --- mistral3 --------------------------------------------------------------------------------------------------------


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
