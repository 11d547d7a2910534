"""Gemma 4 against llama.cpp: the keys of its files, its vocabulary, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from tests.adapters.gelu import assert_as_llama_cpp, logprobs_of
from tests.adapters.variants import logprobs, refusal
from tests.changed_files import changed_copy
from tests.llama_cpp import LlamaCpp
from worker.adapters import bind
from worker.adapters.hparams import read_hparams
from worker.cpu.backend import CpuBackend, uploader
from worker.gguf_file import GgufFile
from worker.model import ModelOptions
from worker.quants import dequantize
from worker.text.tokenizer import load_tokenizer

GLU = ("gate", "up")
ROTATED = np.where(np.arange(256) < 32, 1.0, 1e30)


def changed(exact, folder, keys, name="gemma4", **parts):
    metadata = {f"gemma4.{key}": value for key, value in keys.items()}
    return changed_copy(exact(name), folder / "g.gguf", metadata=metadata, **parts)


@pytest.mark.parametrize(("name", "bound"), [("gemma4", 1e-3), ("gemma4-experts", 1e-3), ("gemma4-shared", 2e-3)])
def test_a_tiny_model_has_llama_cpp_s_log_probabilities(name, bound, exact, monkeypatch):
    assert_as_llama_cpp(exact(name), monkeypatch, bound)


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
        ("attention.shared_kv_layers", 3),
        ("attention.shared_kv_layers", 4),
        ("attention.shared_kv_layers", 5),
        ("attention.shared_kv_layers", 1 << 25),
        ("embedding_length_per_layer_input", 1 << 25),
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
        ({"attention.shared_kv_layers": 3}, "is 3; expected fewer than 4, with an earlier layer of each kind"),
        ({"embedding_length_per_layer_input": 256}, "tensor blk.0.inp_gate.weight is missing"),
        ({"expert_count": 8}, "gemma4.expert_used_count is 0; expected 1 to 8 experts"),
        (
            {"expert_used_count": 3},
            "expert_count is missing; expected the experts of which gemma4.expert_used_count uses 3",
        ),
        ({"expert_count": 1 << 25}, "gemma4.expert_count is 33554432; expected 0 to 16777216"),
        ({"attention.scale": 1 / 512**0.5}, "expected 0.0 or 1.0, which changes nothing"),
        ({"attention.sliding_window_pattern": [1, 2, 1, 0]}, "is an array of 4 integers; expected 4 bools"),
        (
            {"attention.head_count_kv": [2.0, 1.0, 2.0, 1.0]},
            "is an array of 4 floats; expected an integer, or 4 integers",
        ),
        ({"expert_count": 8, "expert_used_count": 3}, "gemma4.expert_feed_forward_length' is missing"),
        ({"rope.scaling.factor": 8.0}, "gemma4.rope.scaling.type is 'linear' by 8.0; expected no scaling"),
    ],
)
def test_other_models_of_the_family_are_refused_in_a_sentence(keys, sentence, exact, tmp_path):
    assert sentence in refusal(changed(exact, tmp_path, keys))


@pytest.mark.parametrize("tensor", ["rope_freqs.weight", "blk.0.layer_output_scale.weight", "blk.1.attn_k.weight"])
def test_a_tensor_of_another_shape_is_refused_by_name(tensor, exact, tmp_path):
    assert tensor in refusal(changed(exact, tmp_path, {}, tensors={tensor: np.ones(7)}))


@pytest.mark.parametrize(
    ("tensor", "value", "sentence"),
    [
        ("rope_freqs.weight", 0.0, "tensor rope_freqs.weight has the value 0.0; expected numbers above 0"),
        ("rope_freqs.weight", np.nan, "tensor rope_freqs.weight has a value that is not finite"),
        ("blk.0.layer_output_scale.weight", np.inf, "tensor blk.0.layer_output_scale.weight has a value that is not"),
    ],
)
def test_a_number_that_loading_cannot_use_is_refused(tensor, value, sentence, exact, tmp_path):
    values = ROTATED.copy() if tensor == "rope_freqs.weight" else np.ones(1)
    values[-1] = value
    assert sentence in refusal(changed(exact, tmp_path, {}, tensors={tensor: values}))


@pytest.mark.parametrize("tensor", ["rope_freqs.weight", "blk.1.attn_k.weight", "blk.3.post_ffw_norm.weight"])
def test_a_missing_tensor_is_refused_by_name(tensor, exact, tmp_path):
    assert tensor in refusal(changed(exact, tmp_path, {}, drop=[tensor]))


@pytest.mark.parametrize(
    "keys",
    [
        {"rope.freq_base_swa": None},
        {"attention.shared_kv_layers": None},
        {"feed_forward_length": [512] * 4},
        {"attention.scale": 1.0},
        {"attention.sliding_window_pattern": [1, 0, 1, 0]},
        {"vision.block_count": 16, "audio.embedding_length": 1024},
    ],
)
def test_values_that_change_nothing_are_accepted(keys, exact, tmp_path, monkeypatch):
    path = changed(exact, tmp_path, keys)
    assert (logprobs(path) == logprobs(exact("gemma4"))).all()
    assert_as_llama_cpp(path, monkeypatch)


def shared_changed(exact, folder, keys=(), **parts):
    return changed(exact, folder, dict(keys), "gemma4-shared", **parts)


SHARED = {
    "table": {"per_layer_token_embd.weight": np.random.default_rng(0).normal(size=(448, 384)) / 4},
    "projection": {"per_layer_model_proj.weight": np.random.default_rng(0).normal(size=(384, 256)) / 99},
    "norm": {"per_layer_proj_norm.weight": np.linspace(-1, 3, 64)},
    "gate": {"blk.3.inp_gate.weight": np.random.default_rng(0).normal(size=(64, 256)) / 8},
    "its norm": {"blk.5.post_norm.weight": np.linspace(-1, 3, 256)},
    "scale": {"blk.4.layer_output_scale.weight": np.ones(1) / 3},
}


@pytest.mark.parametrize("tensors", SHARED.values(), ids=SHARED)
def test_inputs_of_layers_are_applied_as_in_llama_cpp(tensors, exact, tmp_path, monkeypatch):
    path = shared_changed(exact, tmp_path, tensors=tensors)
    assert_as_llama_cpp(path, monkeypatch, 2e-3)
    assert np.abs(logprobs_of(path) - logprobs_of(exact("gemma4-shared"))).max() > 1e-2


def test_a_window_applies_in_layers_that_share_keys_and_values(exact, tmp_path, monkeypatch):
    path = shared_changed(exact, tmp_path, {"attention.sliding_window": 21})
    assert_as_llama_cpp(path, monkeypatch, 2e-3)
    assert np.abs(logprobs_of(path) - logprobs_of(exact("gemma4-shared"))).max() > 1e-2


def test_layers_that_share_keys_and_values_need_not_be_wider(exact, tmp_path, monkeypatch):
    """E4B."""
    with GgufFile.open(exact("gemma4-shared")) as file:
        parts = {name: file.data(info).view("<f4") for name, info in file.tensors.items() if ".ffn_" in name}
    narrow = {name: parts[name][:512] for i in (4, 5) for part in GLU for name in [f"blk.{i}.ffn_{part}.weight"]}
    narrow |= {name: parts[name][:, :512] for i in (4, 5) for name in [f"blk.{i}.ffn_down.weight"]}
    path = shared_changed(exact, tmp_path, {"feed_forward_length": 512}, tensors=narrow)
    assert_as_llama_cpp(path, monkeypatch, 2e-3)


def test_inputs_of_layers_and_shared_keys_do_not_need_each_other(exact, tmp_path, monkeypatch):
    inputs = [name for name in parts_of(exact("gemma4-shared")) if "per_layer" in name]
    inputs += [f"blk.{i}.{part}.weight" for i in range(6) for part in ("inp_gate", "proj", "post_norm")]
    alone = shared_changed(exact, tmp_path, {"embedding_length_per_layer_input": 0}, drop=inputs)
    assert_as_llama_cpp(alone, monkeypatch, 2e-3)
    assert np.abs(logprobs_of(alone) - logprobs_of(exact("gemma4-shared"))).max() > 1e-2


def parts_of(path):
    with GgufFile.open(path) as file:
        return list(file.tensors)


def test_keys_and_values_of_layers_that_do_not_use_them_are_left_out(exact, tmp_path, monkeypatch):
    """Published files have them, as the checkpoints do."""
    rng = np.random.default_rng(0)
    unused = {
        f"blk.{i}.attn_{part}.weight": rng.normal(size=(d, 256)) for i, d in ((4, 256), (5, 512)) for part in "kv"
    }
    unused |= {f"blk.{i}.attn_k_norm.weight": rng.normal(size=d) for i, d in ((4, 256), (5, 512))}
    path = shared_changed(exact, tmp_path, tensors=unused)
    assert (logprobs(path) == logprobs(exact("gemma4-shared"))).all()
    assert_as_llama_cpp(path, monkeypatch, 2e-3)
    with GgufFile.open(path) as file:
        _, weights = bind(file, ModelOptions(512))
        assert set(weights.unused()) == set(unused)
        assert not set(unused) & {info.name for info in weights.claimed()}


@pytest.mark.parametrize(
    "tensor",
    [
        *("per_layer_token_embd.weight", "per_layer_model_proj.weight", "per_layer_proj_norm.weight"),
        *("blk.1.inp_gate.weight", "blk.5.proj.weight", "blk.4.post_norm.weight", "blk.3.attn_k.weight"),
    ],
)
@pytest.mark.parametrize("change", ["missing", "of another shape"])
def test_inputs_of_layers_without_one_of_their_tensors_are_refused_by_name(tensor, change, exact, tmp_path):
    parts = {"drop": [tensor]} if change == "missing" else {"tensors": {tensor: np.ones((7, 32))}}
    assert tensor in refusal(shared_changed(exact, tmp_path, **parts))


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"attention.shared_kv_layers": 5}, "gemma4.attention.shared_kv_layers is 5; expected fewer than 6"),
        ({"attention.shared_kv_layers": 0}, "tensor blk.4.attn_k.weight is missing"),
        (
            {"attention.head_count_kv": [1, 1, 1, 1, 2, 1]},
            "gemma4.attention.head_count_kv is 2 in layer 4; expected that",
        ),
        ({"embedding_length_per_layer_input": 0}, "tensor 'per_layer_token_embd.weight' has no place"),
        ({"embedding_length_per_layer_input": 32}, "tensor blk.0.inp_gate.weight has shape [64, 256]"),
    ],
)
def test_shared_keys_and_values_that_cannot_be_are_refused_in_a_sentence(keys, sentence, exact, tmp_path):
    assert sentence in refusal(shared_changed(exact, tmp_path, keys))


def test_the_plan_counts_keys_of_the_layers_that_have_them_and_a_table_as_it_is_stored(tiny):
    with GgufFile.open(tiny("gemma4-shared")) as file:
        (model, weights), hp = bind(file, ModelOptions(512)), read_hparams(file)
        (table,) = (info for info in weights.claimed() if info.is_table)
        backend = CpuBackend()
        sizes = {info.name: backend.weight_bytes(info) for info in weights.claimed()}
    assert table.name == "per_layer_token_embd.weight"
    assert (hp.layer_input_length, hp.layer_inputs_width) == (64, 384)
    assert sizes[table.name] == table.nbytes < 4 * 448 * 384
    assert [layer.attention.layer for layer in model.layers] == [0, 1, 2, 3, 2, 3]
    assert [layer.attention.reads_only for layer in model.layers] == [False] * 4 + [True] * 2
    assert backend.kv_bytes_per_token(model) == 4 * 2 * (2 * 256 + 2 * 512)
    narrow = backend.overhead_bytes(model, replace(hp, vocab_size=1, layer_input_length=0), 1)
    wide = backend.overhead_bytes(model, replace(hp, vocab_size=1, layer_input_length=2048), 1)
    assert wide - narrow == 4 * 64 * 4 * (6 * 2048 - 4 * 512)


def test_rows_of_a_table_are_dequantized_as_those_of_the_whole_matrix(tiny, monkeypatch):
    """The whole table of E4B would take 11 GB on the CPU."""
    with GgufFile.open(tiny("gemma4-shared")) as file:
        info = file.tensors["per_layer_token_embd.weight"]
        whole = dequantize(file.data(info), info.kind)
        with uploader(file) as upload:
            table = upload(replace(info, is_table=True))
    ids = np.array([7, 447, 7, 0], np.int32)
    elements = []
    monkeypatch.setattr(
        "worker.cpu.backend.dequantize", lambda data, kind: elements.append(len(data)) or dequantize(data, kind)
    )
    assert (table.data[ids] == whole[ids]).all()
    assert (table.rows(3, 5).data == whole[3:5]).all()
    assert elements == [4, 2]


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
    assert CpuBackend("f16").kv_bytes_per_token(model) == 4 * 2 * 2 * 512


CHATS = [
    [{"role": "user", "content": " hello world "}],
    [{"role": "system", "content": "the"}, {"role": "user", "content": "hello\n\n\n12"}],
]


def test_a_vocabulary_that_only_pre_names_is_gemma4_s(exact, tmp_path):
    """Ollama's converter writes the kind `llama`, no BOS and no `add_space_prefix`, and merges."""
    keys = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "gemma4", "tokenizer.ggml.add_bos_token": False}
    path = changed_copy(exact("gemma4"), tmp_path / "g.gguf", metadata=keys)
    with GgufFile.open(exact("gemma4")) as file, GgufFile.open(path) as theirs:
        own, same = load_tokenizer(file.metadata), load_tokenizer(theirs.metadata)
    assert own.vocab == same.vocab
    for text in ("the other", "theother", " hello", "a  b\n\nc\n"):
        assert own.encode_prompt(text) == same.encode_prompt(text), text


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
