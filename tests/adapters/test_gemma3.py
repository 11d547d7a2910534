"""Gemma 3 against llama.cpp: the keys of its files, and its vocabulary with end tokens and template."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pytest

from tests.adapters.gelu import assert_as_llama_cpp, logprobs_of
from tests.adapters.variants import fused, logprobs, refusal
from tests.changed_files import changed_copy
from tests.llama_cpp import LlamaCpp
from worker.gguf_file import GgufFile
from worker.text.tokenizer import load_tokenizer


@pytest.mark.parametrize("name", ["gemma3", "gemma3-27b"])
def test_a_tiny_model_has_llama_cpp_s_log_probabilities(name, exact, monkeypatch):
    assert_as_llama_cpp(exact(name), monkeypatch)


@pytest.mark.parametrize(
    "keys",
    [
        {"attention.sliding_window": 47},
        {"attention.sliding_window": None},
        {"attention.sliding_window": 0},
        {"attention.sliding_window_pattern": None},
        {"attention.sliding_window_pattern": [False, True, True]},
        {"rope.freq_base_swa": 5e4},
        {"rope.freq_base": 3e5},
        {"rope.scaling.factor": 2.0},
        {"rope.scaling.type": "none"},
        {"rope.scaling.type": None, "rope.scaling.factor": None},
        {"attention.layer_norm_rms_epsilon": 0.5},
    ],
    ids=str,
)
def test_keys_are_applied_as_in_llama_cpp(keys, exact, tmp_path, monkeypatch):
    path = changed_copy(
        exact("gemma3"), tmp_path / "g.gguf", metadata={f"gemma3.{key}": value for key, value in keys.items()}
    )
    assert_as_llama_cpp(path, monkeypatch)
    assert np.abs(logprobs_of(path) - logprobs_of(exact("gemma3"))).max() > 1e-2


def test_a_period_of_one_has_no_layer_with_a_window(exact, tmp_path):
    """llama.cpp aborts on such a file."""
    keys = {"gemma3.attention.sliding_window_pattern": 1}, {"gemma3.attention.sliding_window": None}
    paths = [changed_copy(exact("gemma3"), tmp_path / f"{i}.gguf", metadata=each) for i, each in enumerate(keys)]
    assert (logprobs_of(paths[0]) == logprobs_of(paths[1])).all()


def test_q_k_and_v_may_be_one_tensor(exact, tmp_path):
    tensors, drop = fused(exact("gemma3"), "gemma3")
    path = changed_copy(exact("gemma3"), tmp_path / "g.gguf", tensors=tensors, drop=drop)
    assert (logprobs(path) == logprobs(exact("gemma3"))).all()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("attention.sliding_window_pattern", 0),
        ("attention.sliding_window_pattern", [True, False]),
        ("attention.scale", 0.5),
        ("attention.value_length", 128),
        ("expert_count", 4),
        ("rope.scaling.type", "yarn"),
        ("rope.scaling.type", "longrope"),
        ("rope.freq_base_swa", 0.0),
        ("embedding_scale", 2.0),
    ],
)
def test_a_key_that_is_not_handled_is_refused_by_name(key, value, exact, tmp_path):
    path = changed_copy(exact("gemma3"), tmp_path / "g.gguf", metadata={f"gemma3.{key}": value})
    assert f"gemma3.{key}" in refusal(path)


@pytest.mark.parametrize(("key", "value"), [("attn_logit_softcapping", 0.0), ("attention.scale", 1 / 16)])
def test_a_value_that_changes_nothing_is_accepted(key, value, exact, tmp_path):
    path = changed_copy(exact("gemma3"), tmp_path / "g.gguf", metadata={f"gemma3.{key}": value})
    assert (logprobs(path) == logprobs(exact("gemma3"))).all()


@pytest.mark.parametrize("tensor", ["rope_freqs.weight", "blk.0.attn_sinks.weight", "blk.1.ffn_gate_exps.weight"])
def test_a_tensor_of_another_architecture_is_refused_by_name(tensor, exact, tmp_path):
    path = changed_copy(exact("gemma3"), tmp_path / "g.gguf", tensors={tensor: np.ones(8)})
    assert tensor in refusal(path)


CHATS = [
    [{"role": "user", "content": " hello world "}],
    [{"role": "system", "content": "the"}, {"role": "user", "content": "hello\n\n\n12"}],
    [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "  world <end_of_turn>"},
        {"role": "user", "content": "日本 é <unk>"},
    ],
]


def test_texts_chats_and_end_tokens_are_those_of_llama_cpp(exact):
    with GgufFile.open(exact("gemma3")) as file:
        tokenizer = load_tokenizer(file.metadata)
    now, ids = datetime(2026, 1, 1, tzinfo=UTC), tokenizer.vocab.ids
    with LlamaCpp(exact("gemma3"), context=512) as llama_cpp:
        for text in ("hello the world", " hello", "a  b\n\nc\n", "日本🙂 <mask>"):
            assert tokenizer.encode_prompt(text) == llama_cpp.tokenize(text, bos=True, special=True), text
        for chat in CHATS[:2]:
            prompt = llama_cpp.apply_template(chat)
            assert tokenizer.encode_chat(chat, now=now) == llama_cpp.tokenize(prompt, bos=True, special=True)
        assert tokenizer.encode_chat(CHATS[2], now=now).count(ids["<end_of_turn>"]) == 3  # none from a text
        assert tokenizer.vocab.end_ids == {ids["<eos>"], ids["<end_of_turn>"]}
        assert all(
            llama_cpp.ends_at(ids[name]) == (ids[name] in tokenizer.vocab.end_ids)
            for name in ("<eos>", "<end_of_turn>", "<start_of_turn>", "<mask>", "<bos>")
        )
