"""What `worker inspect` reports of a file that no adapter understands."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace

import numpy as np
import pytest
from gguf import constants

from tests.changed_files import changed_copy
from tests.tiny_models import TINY
from worker.adapters import ADAPTERS
from worker.adapters.diagnosis import diagnose
from worker.adapters.features import UNKNOWN, describe_part
from worker.cli.models import _print_report, _report
from worker.gguf_file import GgufFile
from worker.quants import quant_type

COMMON = {"token_embd", "output", "output_norm", "blk.*.attn_norm", "blk.*.attn_rot_embd"}
OTHER_MODELS = r"(v|a|mm|resampler|conv1d|convnext|posnet|dense|cls|h|c|msa|nextn|mtp|fc|model)\b.*|.*\.vis_.*|dense_\d"
"""Names of parts of other kinds of models: vision, audio, embeddings."""
D = 64


@pytest.fixture
def file_of(tiny):
    """A function from architecture, keys without prefix and tensor shapes to an open file."""
    opened = []

    def make(architecture, keys, shapes):
        file = GgufFile.open(tiny("llama"))
        opened.append(file)
        some = file.tensors["token_embd.weight"]
        file.architecture = architecture
        file.metadata = {f"{architecture}.{key}": value for key, value in keys.items()}
        file.tensors = {name: replace(some, name=name, shape=shape) for name, shape in shapes.items()}
        return file

    yield make
    for file in opened:
        file.close()


KEYS = {
    "block_count": 4,
    "context_length": 512,
    "embedding_length": D,
    "feed_forward_length": 128,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.key_length": 32,
    "attention.value_length": 32,
    "attention.layer_norm_rms_epsilon": 1e-6,
}
DENSE = {
    "attn_norm": (D,),
    "attn_q": (128, D),
    "attn_k": (64, D),
    "attn_v": (64, D),
    "attn_output": (D, 128),
    "ffn_norm": (D,),
    "ffn_gate": (128, D),
    "ffn_up": (128, D),
    "ffn_down": (D, 128),
}
EXPERTS = {"ffn_gate_inp": (8, D), "ffn_gate_exps": (8, 32, D), "ffn_up_exps": (8, 32, D), "ffn_down_exps": (8, D, 32)}


def layers(parts, which=range(4)):
    """Tensors of these layers, and the embedding and output norm."""
    whole = {"token_embd.weight": (320, D), "output_norm.weight": (D,)}
    for i in which:
        named = {f"blk.{i}.{part}": shape for part, shape in parts.items()}
        whole |= {f"{name}.weight" if "." not in name[6:] else name: shape for name, shape in named.items()}
    return whole


def found_in(file):
    """The parts by description, and the whole diagnosis."""
    diagnosis = diagnose(file)
    return {part.what: part for part in diagnosis.parts}, diagnosis


def part_with(parts, text):
    (part,) = (part for what, part in parts.items() if text in what)
    return part


def test_state_space_tensors_are_explained_with_their_keys(file_of):
    recurrent = {"attn_norm": (D,), "ssm_conv1d": (256, 4), "ssm_a.": (4,), "ssm_beta": (4, D), "ssm_out": (D, 128)}
    shapes = layers(recurrent, range(3)) | layers(DENSE, [3])
    parts, diagnosis = found_in(file_of("qwen35", KEYS | {"ssm.state_size": 32, "full_attention_interval": 4}, shapes))
    part = part_with(parts, "gated delta-net")
    assert "blk.*.ssm_beta.weight (3 layers)" in part.tensors
    assert set(part.keys) == {"qwen35.ssm.state_size = 32", "qwen35.full_attention_interval = 4"}
    assert "prefix cache" in part.needs
    assert "blk.*.ffn_gate.weight (3 layers)" in diagnosis.missing_tensors


def test_latent_attention_and_shared_experts_are_explained(file_of):
    latent = {"attn_q_a": (24, D), "attn_q_b": (128, 24), "attn_kv_a_mqa": (32, D), "attn_kv_a_norm": (24,)}
    latent |= {"attn_k_b": (4, 24, 16), "attn_v_b": (4, 16, 24)}
    norms = {"attn_norm": (D,), "ffn_norm": (D,), "attn_output": (D, 64)}
    shared = {"ffn_gate_shexp": (32, D), "ffn_up_shexp": (32, D), "ffn_down_shexp": (D, 32), "exp_probs_b.bias": (8,)}
    keys = {
        "attention.kv_lora_rank": 24,
        "attention.value_length": 16,
        "expert_count": 8,
        "expert_used_count": 2,
        "expert_feed_forward_length": 32,
        "expert_shared_count": 1,
        "expert_gating_func": 2,
        "leading_dense_block_count": 1,
    }
    file = file_of("deepseek2", KEYS | keys, layers(latent | norms | EXPERTS | shared))
    parts, diagnosis = found_in(file)
    assert not any("a mixture of experts" in what for what in parts), "the closest one is a mixture"
    assert len(part_with(parts, "latent attention").tensors) == len(latent)
    assert part_with(parts, "latent attention").keys == ("deepseek2.attention.kv_lora_rank = 24",)
    assert part_with(parts, "shared experts").keys == ("deepseek2.expert_shared_count = 1",)
    assert part_with(parts, "bias in the choice").tensors == ("blk.*.exp_probs_b.bias (4 layers)",)
    assert part_with(parts, "routing").keys == ("deepseek2.expert_gating_func = 2",)
    assert part_with(parts, "another width than keys").keys == ("deepseek2.attention.value_length = 16",)
    assert part_with(parts, "dense layers between").keys == ("deepseek2.leading_dense_block_count = 1",)
    assert UNKNOWN not in parts
    assert "blk.*.attn_q.weight (4 layers)" in diagnosis.missing_tensors


@pytest.mark.parametrize(
    ("norms", "closest"), [({}, "llama"), ({"attn_q_norm": (32,), "attn_k_norm": (32,)}, "qwen3moe")]
)
def test_an_architecture_that_needs_keys_of_its_own_is_not_the_closest_without_them(norms, closest, file_of):
    """GLM-4.5 shares the name of its second norm with gpt-oss, which has a window."""
    attention = {part: shape for part, shape in DENSE.items() if part.startswith("attn")} | norms
    attention |= {"post_attention_norm": (D,), "attn_q.bias": (128,), "attn_k.bias": (64,), "attn_v.bias": (64,)}
    keys = KEYS | {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 32}
    _, diagnosis = found_in(file_of("glm4moe", keys, layers(attention | EXPERTS)))
    assert diagnosis.closest == closest
    assert diagnosis.missing_tensors == ("blk.*.ffn_norm.weight (4 layers)",)
    assert diagnosis.missing_keys == ()


def test_norms_softcaps_and_windows_are_explained(file_of):
    keys = {"attn_logit_softcapping": 50.0, "attention.sliding_window": 64}
    shapes = layers(DENSE | {"layer_output_norm": (D,), "position_embd": (512, D)})
    parts, diagnosis = found_in(file_of("another", KEYS | keys, shapes))
    assert part_with(parts, "norms after attention").tensors == ("blk.*.layer_output_norm.weight (4 layers)",)
    assert part_with(parts, "softcap").keys == ("another.attn_logit_softcapping = 50",)
    assert part_with(parts, "window").keys == ("another.attention.sliding_window = 64",)
    assert diagnosis.missing_tensors == diagnosis.missing_keys == ()


def test_the_norm_that_may_be_of_attention_or_of_the_ffn_is_explained_as_either(file_of):
    shapes = layers({**DENSE, "post_attention_norm": (D,), "attn_q.bias": (128,), "attn_output.bias": (D,)})
    parts, _ = found_in(file_of("another", KEYS, shapes))
    part = part_with(parts, "if the file has no ffn_norm")
    assert part.tensors == ("blk.*.post_attention_norm.weight (4 layers)",)
    assert "gpt-oss" in part.used_by


@pytest.mark.parametrize("kind", ["adapter", "imatrix", "mmproj"])
def test_a_file_that_is_no_model_has_no_closest_architecture(kind, file_of):
    file = file_of("novel", KEYS, layers(DENSE))
    file.metadata["general.type"] = kind
    assert diagnose(file) is None


def test_a_window_as_long_as_the_context_is_no_part(file_of):
    diagnosis = diagnose(file_of("another", KEYS | {"attention.sliding_window": 512}, layers(DENSE)))
    assert diagnosis.parts == ()


def test_a_norm_of_another_kind_and_numbers_by_layer_are_explained(file_of):
    keys = KEYS | {"attention.layer_norm_epsilon": 1e-5, "attention.head_count_kv": np.array([2, 2, 1, 2])}
    del keys["attention.layer_norm_rms_epsilon"]
    parts, diagnosis = found_in(file_of("another", keys, layers(DENSE | {"attn_norm.bias": (D,)})))
    assert part_with(parts, "LayerNorm").tensors == ("blk.*.attn_norm.bias (4 layers)",)
    assert part_with(parts, "differ between layers").keys == ("another.attention.head_count_kv = [2, 2, 1, 2]",)
    assert diagnosis.missing_keys == ("another.attention.layer_norm_rms_epsilon",)


def test_names_that_no_catalogue_has_are_listed_last_as_unknown(file_of):
    file = file_of("another", KEYS | {"strange.key": 3}, layers({"frobnicate": (3,)} | DENSE | {"attn_q_norm": (32,)}))
    *_, last = diagnose(file).parts
    assert last.what == UNKNOWN
    assert (last.tensors, last.keys) == (("blk.*.frobnicate.weight (4 layers)",), ("another.strange.key = 3",))


def test_norms_of_q_and_k_make_qwen3_the_closest_architecture(file_of):
    _, diagnosis = found_in(file_of("another", KEYS, layers(DENSE | {"attn_q_norm": (32,), "attn_k_norm": (32,)})))
    assert (diagnosis.closest, diagnosis.parts, diagnosis.missing_tensors) == ("qwen3", (), ())
    assert diagnosis.known == tuple(ADAPTERS)


@pytest.mark.parametrize("name", TINY)
def test_a_trial_uses_all_of_a_known_architecture_s_file_under_any_name(name, tiny):
    with GgufFile.open(tiny(name)) as file:
        assert diagnose(file) is None
        arch, file.architecture = file.architecture, "another"
        file.metadata = {re.sub(rf"^{arch}\.", "another.", key): value for key, value in file.metadata.items()}
        diagnosis = diagnose(file)
    assert (diagnosis.missing_tensors, diagnosis.missing_keys) == ((), ())
    # phi3's window is applied in no layer, unless `model.sliding_window` is "file".
    keys = [key for part in diagnosis.parts for key in part.keys]
    assert [part.tensors for part in diagnosis.parts if part.tensors] == []
    assert all("sliding_window" in key for key in keys)


def test_a_known_architecture_with_unknown_tensors_names_them_beside_itself(tiny, tmp_path):
    tensors = {"blk.0.attn_q_norm.weight": np.ones(D), "blk.1.attn_sinks.weight": np.ones(4)}
    path = changed_copy(tiny("llama"), tmp_path / "x.gguf", tensors=tensors, metadata={"llama.logit_scale": 16.0})
    with GgufFile.open(path) as file:
        report = json.loads(json.dumps(_report(file, [])))
    found = report["not_understood"]
    assert report["can_run"] is False
    assert "'blk.0.attn_q_norm.weight'" in report["reason"] or "llama.logit_scale" in report["reason"]
    assert found["closest"] == found["architecture"] == "llama"
    parts = {part["what"]: part for part in found["parts"]}
    assert part_with(parts, "norms of q and k")["tensors"] == ["blk.*.attn_q_norm.weight (1 layer)"]
    assert "qwen3" in part_with(parts, "norms of q and k")["used_by"]
    assert part_with(parts, "sink")["used_by"] == ["gpt-oss"]
    assert part_with(parts, "scales of embedding")["keys"] == ["llama.logit_scale = 16"]


def test_a_refused_value_of_a_known_key_has_no_parts(tiny, tmp_path):
    path = changed_copy(tiny("llama"), tmp_path / "x.gguf", metadata={"llama.rope.freq_base": -1.0})
    with GgufFile.open(path) as file:
        report = _report(file, [])
    assert (report["can_run"], report["not_understood"]) == (False, None)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("gemma3", "attention.scale", 0.5),
        ("gemma3", "attention.sliding_window_pattern", [True, False]),
        ("mistral3", "attention.temperature_scale", -1.0),
        ("granite", "rope.dimension_count", 8),
        ("granite", "attention.scale", 1000.0),
    ],
)
def test_a_value_that_its_own_adapter_refuses_has_no_parts(name, key, value, tiny, tmp_path):
    path = changed_copy(tiny(name), tmp_path / "x.gguf", metadata={f"{name}.{key}": value})
    with GgufFile.open(path) as file:
        report = _report(file, [])
    assert key in report["reason"]
    assert (report["can_run"], report["not_understood"]) == (False, None)


def test_long_arrays_of_numbers_take_little_time(file_of):
    numbers = np.ones(1_000_000, np.int32)
    keys = KEYS | {"block_count": numbers, "attention.head_count_kv": numbers, "feed_forward_length": numbers}
    begun = time.process_time()
    diagnose(file_of("novel", keys, layers(DENSE)))
    assert time.process_time() - begun < 2


def test_the_report_of_an_unknown_architecture_shows_all_parts(file_of, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    shapes = layers(DENSE | {"layer_output_norm": (D,), "attn_q_norm": (32,)}) | {"\ud800": (3,)}
    file = file_of("novel", KEYS | {"final_logit_softcapping": 30.0}, shapes)
    report = json.loads(json.dumps(_report(file, [])))
    _print_report(report)
    shown = capsys.readouterr().out
    assert report["can_run"] is False
    for text in (*ADAPTERS, "norms after attention or FFN", "blk.*.layer_output_norm.weight (4 layers)", "tanh"):
        assert text in shown
    assert "closest architecture" in shown
    assert "architecture 'novel' has no adapter" in shown


def test_a_tensor_type_that_is_not_read_is_a_part(file_of):
    file = file_of("novel", KEYS, layers(DENSE))
    file.tensors["output_norm.weight"] = replace(file.tensors["output_norm.weight"], kind=quant_type(9))
    parts, _ = found_in(file)
    assert part_with(parts, "type Q8_1").tensors == ("output_norm.weight",)


def test_every_tensor_name_of_llama_cpp_has_a_description():
    names = {name.replace("{bid}", "*") for name in constants.TENSOR_NAMES.values()}
    plain = {name for name in names - COMMON if not re.fullmatch(OTHER_MODELS, name)}
    assert len(plain) > 100
    assert {name for name in plain if describe_part(f"{name}.weight").what == UNKNOWN} == {"blk.*.ffn"}


@pytest.mark.parametrize(
    "arch", [arch for arch in constants.MODEL_ARCH if constants.MODEL_ARCH_NAMES[arch] not in TINY]
)
def test_every_tensor_of_any_architecture_is_used_or_listed(arch, file_of):
    names = [constants.TENSOR_NAMES[tensor] for tensor in constants.MODEL_TENSORS[arch]]
    shapes = {f"{name.format(bid=i)}.weight": (D, D) for name in names for i in range(2)}
    file = file_of(constants.MODEL_ARCH_NAMES[arch], KEYS | {"expert_count": 8, "expert_used_count": 2}, shapes)
    diagnosis = diagnose(file)
    listed = {name.partition(" ")[0] for part in diagnosis.parts for name in part.tensors}
    assert "token_embd.weight" not in listed
    for name in (re.sub(r"^blk\.\d+", "blk.*", shape) for shape in shapes):
        if "ssm_" in name or "_shexp" in name or "attn_kv_a" in name:
            assert name in listed


HOSTILE = (0, 1 << 31, -1, 1.5, "x", float("nan"), True, np.array([], np.int32), np.array([1 << 40, 3]), ["a", "b"])


OTHERS = (
    *("rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.freq_base", "rope.freq_base_swa"),
    *("expert_count", "attention.sliding_window", "attention.sliding_window_pattern", "attention.scale"),
    *("attention.temperature_scale", "residual_scale", "logit_scale"),
)


@pytest.mark.parametrize("value", HOSTILE, ids=repr)
@pytest.mark.parametrize("key", [*KEYS, *OTHERS])
def test_no_value_of_a_key_makes_the_diagnosis_fail(key, value, file_of):
    diagnosis = diagnose(file_of("novel", KEYS | {"expert_used_count": 2, key: value}, layers(DENSE | EXPERTS)))
    assert diagnosis.architecture == "novel"
    json.dumps(diagnosis.closest)


def test_layers_with_any_number_are_counted_by_their_tensors(file_of):
    shapes = {"token_embd.weight": (320, D), f"blk.{10**30}.attn_norm.weight": (D,)}
    assert diagnose(file_of("novel", KEYS | {"block_count": 1 << 24}, shapes)).missing_tensors
