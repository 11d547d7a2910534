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
from worker.cpu.backend import CpuBackend
from worker.gguf_file import GgufFile
from worker.model import ModelOptions
from worker.text.tokenizer import load_tokenizer

ROTATED = np.where(np.arange(256) < 32, 1.0, 1e30)


def changed(exact, folder, keys, **parts):
    metadata = {f"gemma4.{key}": value for key, value in keys.items()}
    return changed_copy(exact("gemma4"), folder / "g.gguf", metadata=metadata, **parts)


def test_a_tiny_model_has_llama_cpp_s_log_probabilities(exact, monkeypatch):
    assert_as_llama_cpp(exact("gemma4"), monkeypatch)


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
        ("expert_count", 4),
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
        ({"attention.shared_kv_layers": 20}, "Gemma 4 E2B and E4B are not served, its dense 31B is"),
        ({"embedding_length_per_layer_input": 256}, "Gemma 4 E2B and E4B are not served, its dense 31B is"),
        ({"expert_count": 128, "expert_used_count": 8}, "gemma4 models are served without experts"),
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
