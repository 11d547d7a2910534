"""The maker of full-size files, against the sizes of published files; the vocabularies load and encode text."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as Type

from tests.full_size_models import FULL_SIZE, make_full_size, q4_k_m
from tests.models import ids, run
from tests.tiny_models import TINY, tensors_of, write_model
from worker import runtime
from worker.config import EngineSection, ModelSection
from worker.engine import Sequence
from worker.sampling import Sampling

PUBLISHED_GB = {
    "qwen3-4b": 2.50,
    "qwen3-30b-a3b": 18.56,
    "gemma3-4b": 2.49,
    "mistral-7b": 4.37,
    "granite-3.3-8b": 4.94,
    "smollm3-3b": 1.915,
    "ministral-3-8b": 5.199,
    "gemma4-31b": 18.7,
    "gemma4-26b-a4b": 16.8,
}
"""Sizes of the Q4_K_M files on Hugging Face."""
TEXT = "Hello world, 123 ünïcode 日本"


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_tensors_are_as_large_as_those_of_the_published_file(name):
    shape = FULL_SIZE[name]
    kind_of, nbytes = q4_k_m(shape), 0
    for tensor in tensors_of(shape):
        elements, size = GGML_QUANT_SIZES[kind_of(tensor) if tensor.quantized else Type.F32]
        nbytes += math.prod(tensor.shape) // elements * size
    assert nbytes / 1e9 == pytest.approx(PUBLISHED_GB[name], rel=0.005)


@pytest.mark.parametrize("layers", [1, 6])
def test_the_first_layers_of_gemma_4_alone_are_a_model(layers, tmp_path, monkeypatch):
    shape = FULL_SIZE["gemma4-31b"]
    narrow = replace(shape, width=256, ffn=256, big_vocabulary=None)
    monkeypatch.setitem(FULL_SIZE, "narrow", narrow)
    path = make_full_size("narrow", tmp_path / "model.gguf", layers=layers)
    loaded = runtime.load(path, ModelSection(), EngineSection(backend="cpu"))
    assert len(ids(run(loaded.engine, Sequence("job", [5, 6, 7], 2, Sampling(temperature=0)))["job"])) == 2


@pytest.mark.parametrize(
    ("name", "tiny"),
    [
        ("qwen3-4b", "qwen3"),
        ("gemma3-4b", "gemma3"),
        ("mistral-7b", "llama"),
        ("granite-3.3-8b", "granite"),
        ("smollm3-3b", "smollm3"),
        ("ministral-3-8b", "mistral3"),
        ("gemma4-31b", "gemma4"),
    ],
)
def test_a_model_with_the_full_vocabulary_answers_on_the_cpu(name, tiny, tmp_path):
    shape = replace(TINY[tiny], big_vocabulary=FULL_SIZE[name].vocabulary)
    path = write_model(tmp_path / "model.gguf", shape, name, LlamaFileType.MOSTLY_Q8_0, lambda _: Type.Q8_0, 0)
    loaded = runtime.load(path, ModelSection(), EngineSection(backend="cpu"))
    tokenizer = loaded.tokenizer
    prompt = tokenizer.encode(TEXT, special=False)
    assert b"".join(map(tokenizer.token_bytes, prompt)).decode().strip() == TEXT
    assert tokenizer.vocab.size == loaded.vocab_size == shape.vocab
    drawn = run(loaded.engine, Sequence("job", prompt, 3, Sampling(temperature=0, logprobs=1)))["job"]
    assert len(ids(drawn)) == 3
    assert all(math.isfinite(each.draw.logprob) for each in drawn)
