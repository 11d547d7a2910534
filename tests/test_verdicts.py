"""`worker inspect` and loading give one verdict, and metadata that is not needed refuses no file."""

from __future__ import annotations

import json

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from tests.changed_files import changed_copy
from tests.tiny_models import TINY
from worker import runtime
from worker.cli.models import _report
from worker.config import EngineSection, ModelSection
from worker.errors import WorkerError
from worker.gguf_file import GgufFile

PUBLISHED = {
    "general.type": "model", "general.name": "A Model", "general.author": "x", "general.version": "1",
    "general.organization": "x", "general.finetune": "Instruct", "general.basename": "x", "general.description": "x",
    "general.quantized_by": "x", "general.size_label": "1B", "general.license": "apache-2.0",
    "general.license.name": "x", "general.license.link": "x", "general.url": "x", "general.repo_url": "x",
    "general.source.url": "x", "general.source.huggingface.repository": "x", "general.base_model.count": 1,
    "general.base_model.0.name": "x", "general.base_model.0.organization": "x", "general.base_model.0.repo_url": "x",
    "general.dataset.count": 1, "general.dataset.0.name": "x", "general.tags": ["a", "b"], "general.languages": ["en"],
    "general.datasets": ["x"], "general.file_type": 15, "general.quantization_version": 2,
    "general.sampling.temp": 0.7, "quantize.imatrix.file": "x", "quantize.imatrix.dataset": "x",
    "quantize.imatrix.entries_count": 224, "quantize.imatrix.chunks_count": 128,
    "tokenizer.ggml.add_eos_token": False, "tokenizer.ggml.seperator_token_id": 1, "tokenizer.ggml.mask_token_id": 1,
    "tokenizer.ggml.cls_token_id": 1, "tokenizer.ggml.token_type_count": 1, "tokenizer.huggingface.json": "{}",
    "tokenizer.chat_template.tool_use": "x", "tokenizer.chat_templates": ["tool_use"],
    "split.no": 0, "split.count": 0, "split.tensors.count": 20,
}  # fmt: skip
"""Keys that published files have besides those that the tiny models have."""

OF_LLAMA_3 = {"rope.dimension_count": 64, "attention.key_length": 64, "attention.value_length": 64, "vocab_size": 320}
OF_PHI_3 = {"rope.dimension_count": 96, "attention.sliding_window": 2047, "rope.scaling.attn_factor": 1.19}


def verdict(path):
    """The report of `inspect`, whose verdict must be that of loading."""
    settings = ModelSection(), EngineSection(backend="cpu")
    with GgufFile.open(path) as file:
        report = json.loads(json.dumps(_report(file, [])))
    if report["can_run"]:
        runtime.load(path, *settings)
        return report
    with pytest.raises(WorkerError) as failure:
        runtime.load(path, *settings)
    assert report["reason"] == failure.value.message
    return report


@pytest.mark.parametrize("name", ["qwen2", "phi3", "phi3-longrope", "gpt-oss", "llama", "llama3-rope"])
def test_the_keys_of_published_files_are_accepted_without_a_warning(name, tiny, tmp_path):
    arch = TINY[name].arch
    own = {"llama": OF_LLAMA_3, "phi3": OF_PHI_3}.get(arch, {})
    metadata = PUBLISHED | {f"{arch}.{key}": value for key, value in own.items()}
    report = verdict(changed_copy(tiny(name), tmp_path / "m.gguf", metadata=metadata))
    assert report["can_run"]
    assert report["unknown_keys"] == []
    assert report["unused_tensors"] == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("general.description", b"caf\xe9"),
        ("general.name", b"\xff\xfe"),
        ("general.name", 7),
        ("general.tags", 3),
        ("general.file_type", "x"),
        ("tokenizer.ggml.pre", ""),
        ("tokenizer.huggingface.json", b"\xff"),
        ("tokenizer.chat_template", b"{{ messages }}\xff"),
        ("tokenizer.chat_template", 7),
        ("general.languages", [b"\xff", b"en"]),
    ],
)
@pytest.mark.parametrize("name", ["qwen2", "phi3"])
def test_metadata_that_is_not_needed_refuses_no_file(name, key, value, tiny, tmp_path):
    assert verdict(changed_copy(tiny(name), tmp_path / "m.gguf", metadata={key: value}))["can_run"]


@pytest.mark.parametrize(
    ("metadata", "tensors", "reason"),
    [
        ({}, {"blk.0.attn_q.bias_scale": np.ones(4)}, "blk.0.attn_q.bias_scale"),
        ({"llama.logit_scale": 2.0}, {}, "llama.logit_scale is 2.0"),
        ({"general.type": "imatrix"}, {}, "importance matrix"),
        ({"general.architecture": "mamba"}, {}, "'mamba' has no adapter; expected gemma3 or gemma4 or gpt-oss or"),
        ({"tokenizer.ggml.model": "wordpiece"}, {}, "wordpiece"),
        ({}, {"token_embd.weight": np.ones((319, 256))}, "320 tokens for 319 embedding rows"),
    ],
)
def test_what_cannot_run_is_refused_with_one_reason(metadata, tensors, reason, tiny, tmp_path):
    report = verdict(changed_copy(tiny("llama"), tmp_path / "m.gguf", metadata=metadata, tensors=tensors))
    assert not report["can_run"]
    assert reason in report["reason"]
    assert report["tensors"]
    assert len(report["fingerprint"]) == 64


def test_an_unsupported_type_still_gives_the_whole_report(tiny, tmp_path):
    path = tmp_path / "m.gguf"
    data = bytearray(tiny("llama").read_bytes())
    at = data.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8
    data[at : at + 4] = int(GGMLQuantizationType.F64).to_bytes(4, "little")
    path.write_bytes(data + bytes(8192))
    report = verdict(path)
    assert "output_norm.weight is of type F64 (28)" in report["reason"]
    assert report["tensors"]["F64"]["count"] == 1
    assert report["tokenizer"]["end_tokens"]


def test_unknown_keys_outside_the_architecture_give_one_warning(tiny, tmp_path):
    keys = {"unsloth.version": "x", "qwen2.rope.scale_linear": 4.0, "general.author": "x"}
    path = changed_copy(tiny("llama"), tmp_path / "m.gguf", metadata=keys)
    assert verdict(path)["unknown_keys"] == ["unsloth.version", "qwen2.rope.scale_linear"]
    loaded = runtime.load(path, ModelSection(), EngineSection(backend="cpu"))
    assert loaded.warning == "ignored unknown metadata keys: unsloth.version, qwen2.rope.scale_linear"
