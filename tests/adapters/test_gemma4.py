"""Gemma 4 against llama.cpp: the keys of its files, its vocabulary, and what is refused."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pytest

from tests.adapters.gelu import assert_as_llama_cpp, logprobs_of
from tests.adapters.variants import logprobs, refusal
from tests.changed_files import changed_copy
from tests.llama_cpp import LlamaCpp
from worker.adapters import bind
from worker.adapters.hparams import read_hparams
from worker.cpu.backend import CpuBackend
from worker.gguf_file import GgufFile
from worker.model import ModelOptions
from worker.text.tokenizer import load_tokenizer

GLU = ("gate", "up")
ROTATED = np.where(np.arange(256) < 32, 1.0, 1e30)


def changed(exact, folder, keys, name="gemma4", **parts):
    metadata = {f"gemma4.{key}": value for key, value in keys.items()}
    return changed_copy(exact(name), folder / "g.gguf", metadata=metadata, **parts)


@pytest.mark.parametrize("name", ["gemma4", "gemma4-experts"])
def test_a_tiny_model_has_llama_cpp_s_log_probabilities(name, exact, monkeypatch):
    assert_as_llama_cpp(exact(name), monkeypatch)


@pytest.mark.parametrize(
    "keys",
    [
        {"attention.sliding_window": 47},
        {"rope.freq_base_swa": 5e4},
        {"rope.freq_base": 3e5},
        {"rope.dimension_count_swa": 128},
        {"final_logit_softcapping": None},
        {"final_logit_softcapping": 0.0},
        {"final_logit_softcapping": 3.0},
        {"attention.layer_norm_rms_epsilon": 0.5},
    ],
    ids=str,
)
def test_keys_are_applied_as_in_llama_cpp(keys, exact, tmp_path, monkeypatch):
    path = changed(exact, tmp_path, keys)
    assert_as_llama_cpp(path, monkeypatch)
    assert np.abs(logprobs_of(path) - logprobs_of(exact("gemma4"))).max() > 1e-2


@pytest.mark.parametrize(
    "parts",
    [
        {"drop": [f"blk.{layer}.layer_output_scale.weight" for layer in range(4)]},
        {"drop": ["blk.2.attn_v.weight"]},
        {"tensors": {"blk.1.attn_v.weight": np.random.default_rng(0).normal(size=(512, 256)) / 12}},
        {"tensors": {"rope_freqs.weight": ROTATED}},
        {"tensors": {"output.weight": np.random.default_rng(0).normal(size=(448, 256)) / 8}},
    ],
    ids=["no scales", "v is k", "own v", "fewer pairs", "own head"],
)
def test_tensors_are_applied_as_in_llama_cpp(parts, exact, tmp_path, monkeypatch):
    path = changed(exact, tmp_path, {}, **parts)
    assert_as_llama_cpp(path, monkeypatch)
    assert np.abs(logprobs_of(path) - logprobs_of(exact("gemma4"))).max() > 1e-2


def test_ffn_widths_may_differ_between_layers(exact, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    wider = {f"blk.3.ffn_{part}.weight": rng.normal(size=(1024, 256)) / 12 for part in ("gate", "up")}
    wider["blk.3.ffn_down.weight"] = rng.normal(size=(256, 1024)) / 24
    assert_as_llama_cpp(
        changed(exact, tmp_path, {"feed_forward_length": [512, 512, 512, 1024]}, tensors=wider), monkeypatch
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.shared_kv_layers", 2),
        ("embedding_length_per_layer_input", 256),
        ("expert_used_count", 2),
        ("attention.sliding_window_pattern", None),
        ("attention.sliding_window_pattern", 2),
        ("attention.sliding_window_pattern", [True, False]),
        ("attention.sliding_window", None),
        ("attention.head_count_kv", [2, 1, 2]),
        ("attention.head_count_kv", [2, 0, 2, 1]),
        ("attention.head_count_kv", [2, 3, 2, 1]),
        ("attention.key_length_swa", None),
        ("attention.value_length_swa", 128),
        ("attention.value_length", 256),
        ("attention.scale", 0.5),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", -1.0),
        ("rope.dimension_count_swa", 257),
        ("rope.freq_base_swa", 0.0),
        ("rope.scaling.type", "yarn"),
        ("embedding_scale", 2.0),
    ],
)
def test_a_key_that_is_not_handled_is_refused_by_name(key, value, exact, tmp_path):
    assert f"gemma4.{key}" in refusal(changed(exact, tmp_path, {key: value}))


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"attention.shared_kv_layers": 20}, "Gemma 4 E2B and E4B are not served, 31B and 26B-A4B are"),
        ({"embedding_length_per_layer_input": 256}, "Gemma 4 E2B and E4B are not served, 31B and 26B-A4B are"),
        ({"expert_count": 8}, "gemma4.expert_used_count is 0; expected 1 to 8 experts"),
        ({"expert_count": 8, "expert_used_count": 3}, "gemma4.expert_feed_forward_length' is missing"),
        ({"rope.scaling.factor": 8.0}, "gemma4.rope.scaling.type is 'linear' by 8.0; expected no scaling"),
    ],
)
def test_other_models_of_the_family_are_refused_in_a_sentence(keys, sentence, exact, tmp_path):
    assert sentence in refusal(changed(exact, tmp_path, keys))


@pytest.mark.parametrize("tensor", ["rope_freqs.weight", "blk.0.layer_output_scale.weight", "blk.1.attn_k.weight"])
def test_a_tensor_of_another_shape_is_refused_by_name(tensor, exact, tmp_path):
    assert tensor in refusal(changed(exact, tmp_path, {}, tensors={tensor: np.ones(7)}))


@pytest.mark.parametrize("tensor", ["rope_freqs.weight", "blk.1.attn_k.weight", "blk.3.post_ffw_norm.weight"])
def test_a_missing_tensor_is_refused_by_name(tensor, exact, tmp_path):
    assert tensor in refusal(changed(exact, tmp_path, {}, drop=[tensor]))


@pytest.mark.parametrize(
    "keys", [{"rope.freq_base_swa": None}, {"attention.shared_kv_layers": None}, {"feed_forward_length": [512] * 4}]
)
def test_values_that_change_nothing_are_accepted(keys, exact, tmp_path, monkeypatch):
    path = changed(exact, tmp_path, keys)
    assert (logprobs(path) == logprobs(exact("gemma4"))).all()
    assert_as_llama_cpp(path, monkeypatch)


def experts_changed(exact, folder, **parts):
    return changed(exact, folder, {}, "gemma4-experts", **parts)


def test_gate_and_up_of_the_experts_may_be_two_tensors(exact, tmp_path, monkeypatch):
    whole = exact("gemma4-experts")
    with GgufFile.open(whole) as file:
        fused = {i: file.data(file.tensors[f"blk.{i}.ffn_gate_up_exps.weight"]).view("<f4") for i in range(4)}
    both = {i: values.reshape(8, 2, 160, 256) for i, values in fused.items()}
    parts = {f"blk.{i}.ffn_{part}_exps.weight": each[:, j] for i, each in both.items() for j, part in enumerate(GLU)}
    path = experts_changed(exact, tmp_path, tensors=parts, drop=[f"blk.{i}.ffn_gate_up_exps.weight" for i in fused])
    assert (logprobs(path) == logprobs(whole)).all()
    assert_as_llama_cpp(path, monkeypatch)


@pytest.mark.parametrize(
    "parts",
    [
        {"drop": ["blk.1.ffn_down_exps.scale"]},
        {"tensors": {"blk.1.ffn_down_exps.scale": np.arange(8.0)}},
        {"tensors": {"blk.2.ffn_gate_inp.scale": np.linspace(-30, 30, 256)}},
        {"tensors": {"blk.0.pre_ffw_norm_2.weight": np.linspace(0, 3, 256)}},
        {"tensors": {"blk.0.post_ffw_norm_1.weight": np.linspace(0, 3, 256)}},
        {"tensors": {"blk.0.post_ffw_norm_2.weight": np.linspace(0, 3, 256)}},
    ],
    ids=["no factors", "factors", "router's norm", "experts' norm", "dense result", "experts' result"],
)
def test_norms_and_factors_of_the_experts_are_applied_as_in_llama_cpp(parts, exact, tmp_path, monkeypatch):
    path = experts_changed(exact, tmp_path, **parts)
    assert_as_llama_cpp(path, monkeypatch)
    assert np.abs(logprobs_of(path) - logprobs_of(exact("gemma4-experts"))).max() > 1e-2


EXPERT_TENSORS = [
    *("ffn_gate_inp.weight", "ffn_gate_inp.scale", "ffn_gate_up_exps.weight", "ffn_down_exps.weight"),
    *("pre_ffw_norm_2.weight", "post_ffw_norm_1.weight", "post_ffw_norm_2.weight", "ffn_gate.weight"),
]


@pytest.mark.parametrize("tensor", EXPERT_TENSORS)
@pytest.mark.parametrize("change", ["missing", "of another shape"])
def test_experts_without_one_of_their_tensors_are_refused_by_name(tensor, change, exact, tmp_path):
    name = f"blk.2.{tensor}"
    parts = {"drop": [name]} if change == "missing" else {"tensors": {name: np.ones((8, 7, 32))}}
    sought = name.replace("gate_up", "gate") if change == "missing" else name
    assert sought in refusal(experts_changed(exact, tmp_path, **parts))


@pytest.mark.parametrize("tensor", ["ffn_up_exps.weight", "ffn_gate_exps.scale", "ffn_norm_exps.weight", "exp_probs_b"])
def test_a_tensor_that_the_experts_do_not_use_is_refused_by_name(tensor, exact, tmp_path):
    path = experts_changed(exact, tmp_path, tensors={f"blk.1.{tensor}": np.ones((8, 160, 256))})
    assert f"blk.1.{tensor}" in refusal(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_used_count", 9),
        ("expert_used_count", 0),
        ("expert_feed_forward_length", None),
        ("expert_feed_forward_length", 96),
        ("expert_gating_func", 2),
        ("expert_weights_scale", 2.5),
        ("expert_shared_feed_forward_length", 64),
        ("expert_group_count", 4),
    ],
)
def test_a_key_of_experts_that_is_not_handled_is_refused(key, value, exact, tmp_path):
    found = refusal(changed(exact, tmp_path, {key: value}, "gemma4-experts"))
    assert (f"gemma4.{key}" in found) or (key == "expert_feed_forward_length" and "ffn_gate_up_exps" in found)


def test_the_plan_counts_the_dense_ffn_beside_the_experts_and_each_part_of_a_tensor_once(exact):
    with GgufFile.open(exact("gemma4-experts")) as file:
        hp, (_, weights) = read_hparams(file), bind(file, ModelOptions(512))
        claimed = list(weights.claimed())
        assert sum(info.nbytes for info in claimed) == file.tensor_bytes
    assert (hp.feed_forward_length, hp.expert_shared_feed_forward_length, hp.ffn_width) == (512, 512, 512)
    halves = [info for info in claimed if "gate_up" in info.name]
    assert [(half.name, half.shape) for half in halves[:2]] == [
        (f"blk.0.ffn_gate_up_exps.weight[:, {rows}]", (8, 160, 256)) for rows in ("0:160", "160:320")
    ]


def test_the_cache_has_the_shape_of_each_layer(exact):
    with GgufFile.open(exact("gemma4")) as file:
        model, _ = bind(file, ModelOptions(512))
    specs = [layer.attention for layer in model.layers]
    assert [(spec.n_kv_heads, spec.head_dim, spec.window) for spec in specs] == [(2, 256, 32), (1, 512, 0)] * 2
    assert CpuBackend(np.float16).kv_bytes_per_token(model) == 4 * 2 * 2 * 512


CHATS = [
    [{"role": "user", "content": " hello world "}],
    [{"role": "system", "content": "the"}, {"role": "user", "content": "hello\n\n\n12"}],
]


def test_texts_chats_and_end_tokens_are_those_of_llama_cpp(exact):
    with GgufFile.open(exact("gemma4")) as file:
        tokenizer = load_tokenizer(file.metadata)
    now, ids = datetime(2026, 1, 1, tzinfo=UTC), tokenizer.vocab.ids
    with LlamaCpp(exact("gemma4"), context=512) as llama_cpp:
        for text in ("hello the world", " hello", "a  b\n\nc\n", "日本🙂 <mask>"):
            assert tokenizer.encode_prompt(text) == llama_cpp.tokenize(text, bos=True, special=True), text
        for chat in CHATS:
            prompt = llama_cpp.apply_template(chat)
            assert tokenizer.encode_chat(chat, now=now) == llama_cpp.tokenize(prompt, bos=True, special=True)
        assert tokenizer.vocab.end_ids == {ids["<eos>"], ids["<turn|>"]}
        assert all(
            llama_cpp.ends_at(ids[name]) == (ids[name] in tokenizer.vocab.end_ids)
            for name in ("<eos>", "<turn|>", "<|turn>", "<mask>", "<bos>")
        )
