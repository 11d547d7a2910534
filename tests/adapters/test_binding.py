"""Binding of files to adapters: claimed tensors, and the errors for files that do not match."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from worker import adapters
from worker.adapters import ADAPTERS
from worker.adapters.hparams import read_hparams
from worker.adapters.weights import Weights
from worker.errors import ModelLoadFailed
from worker.gguf_file import GgufFile
from worker.model import ModelOptions
from worker.quants import Q8_0, quant_type

NAMES = ("qwen2", "qwen2-untied", "phi3", "phi3-longrope", "gpt-oss", "llama", "llama3-rope")
NAMES += (
    "gemma3",
    "granite",
    "granitemoe",
    "granitemoe-shared",
    "mistral3",
    "mistral3-experts",
    "mixtral",
    "qwen3",
    "qwen3moe",
    "smollm3",
)


def bind(file: GgufFile) -> Weights:
    return adapters.bind(file, ModelOptions(context=64))[1]


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_a_complete_file_is_claimed_once(name, tiny):
    with GgufFile.open(tiny(name)) as file:
        weights = bind(file)
        assert weights.unused() == []
        names = [info.name.partition("[")[0] for info in weights.claimed()]
        assert list(dict.fromkeys(names)) == list(file.tensors)
        assert sum(info.nbytes for info in weights.claimed()) == file.tensor_bytes


@pytest.mark.parametrize("name", NAMES)
def test_each_missing_tensor_is_named(name, tiny):
    with GgufFile.open(tiny(name)) as file:
        optional = {tensor for tensor in file.tensors if re.search(r"attn_[qkv]\.bias", tensor)}
        optional |= {"rope_freqs.weight", "rope_factors_long.weight"}
        if name != "gpt-oss":
            optional.add("output.weight")
        for missing in set(file.tensors) - optional:
            kept = dict(file.tensors)
            del kept[missing]
            file.tensors, complete = kept, file.tensors
            with pytest.raises(ModelLoadFailed, match=missing):
                bind(file)
            file.tensors = complete


@pytest.mark.parametrize("name", NAMES)
def test_each_wrong_shape_is_named_with_the_expected_one(name, tiny):
    with GgufFile.open(tiny(name)) as file:
        for wrong, info in list(file.tensors.items()):
            if wrong == "token_embd.weight":  # its rows define the vocabulary's size
                continue
            file.tensors[wrong] = replace(info, shape=(*info.shape[:-1], info.shape[-1] + 32))
            with pytest.raises(ModelLoadFailed, match=wrong) as failure:
                bind(file)
            assert "shape" in failure.value.details["expected"]
            file.tensors[wrong] = info


def test_a_quantized_norm_is_refused(tiny):
    with GgufFile.open(tiny("llama")) as file:
        file.tensors["output_norm.weight"] = replace(file.tensors["output_norm.weight"], kind=Q8_0)
        with pytest.raises(ModelLoadFailed, match="output_norm"):
            bind(file)


@pytest.mark.parametrize("architecture", ["mamba", ""])
def test_an_unknown_architecture_lists_the_known_ones(architecture, tiny):
    with GgufFile.open(tiny("llama")) as file:
        file.architecture = architecture
        with pytest.raises(ModelLoadFailed) as failure:
            bind(file)
    assert all(name in failure.value.message for name in ADAPTERS)


@pytest.mark.parametrize("ggml_id", [24, 4_000])
def test_a_tensor_of_an_unsupported_type_is_named_with_its_type(ggml_id, tiny):
    with GgufFile.open(tiny("llama")) as file:
        kind = quant_type(ggml_id)
        file.tensors["output_norm.weight"] = replace(file.tensors["output_norm.weight"], kind=kind)
        with pytest.raises(ModelLoadFailed, match=rf"output_norm.weight is of type {kind.name} \({ggml_id}\).*MXFP4"):
            bind(file)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count_kv", 3),
        ("llama.block_count", 1 << 30),
        ("llama.attention.value_length", 32),
        ("llama.rope.dimension_count", 63),
        ("llama.rope.dimension_count", 66),
        ("llama.attention.layer_norm_rms_epsilon", -1.0),
        ("llama.rope.freq_base", 0.0),
        ("llama.rope.scaling.type", "dynamic"),
        ("llama.embedding_length", "wide"),
    ],
)
def test_an_invalid_hyper_parameter_is_named(key, value, tiny):
    with GgufFile.open(tiny("llama")) as file:
        file.metadata[key] = value
        with pytest.raises(ModelLoadFailed, match=key.replace(".", r"\.")):
            read_hparams(file)


def test_a_file_with_only_a_vocabulary_is_refused(tiny):
    with GgufFile.open(tiny("llama")) as file:
        file.tensors.clear()
        with pytest.raises(ModelLoadFailed, match="vocabulary"):
            read_hparams(file)
