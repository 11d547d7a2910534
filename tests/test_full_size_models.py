"""The maker of full-size files, against the sizes of published files; the vocabularies load and encode text."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as Type

from tests.full_size_models import FULL_SIZE, q4_k_m
from tests.models import ids, run
from tests.tiny_models import TINY, tensors_of, write_model
from worker import runtime
from worker.config import EngineSection, ModelSection
from worker.engine import Sequence
from worker.sampling import Sampling

PUBLISHED_GB = {"qwen3-4b": 2.50, "qwen3-30b-a3b": 18.56, "gemma3-4b": 2.49, "mistral-7b": 4.37}
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


@pytest.mark.parametrize(("name", "tiny"), [("qwen3-4b", "qwen3"), ("gemma3-4b", "gemma3"), ("mistral-7b", "llama")])
def test_a_model_with_the_full_vocabulary_answers_on_the_cpu(name, tiny, tmp_path):
    shape = replace(TINY[tiny], big_vocabulary=FULL_SIZE[name].vocabulary)
    path = write_model(tmp_path / "model.gguf", shape, name, LlamaFileType.MOSTLY_Q4_K_M, q4_k_m(shape), 0)
    loaded = runtime.load(path, ModelSection(), EngineSection(backend="cpu"))
    tokenizer = loaded.tokenizer
    prompt = tokenizer.encode(TEXT, special=False)
    assert b"".join(map(tokenizer.token_bytes, prompt)).decode().strip() == TEXT
    assert tokenizer.vocab.size == loaded.vocab_size == shape.vocab
    drawn = run(loaded.engine, Sequence("job", prompt, 3, Sampling(temperature=0, logprobs=1)))["job"]
    assert len(ids(drawn)) == 3
    assert all(math.isfinite(each.draw.logprob) for each in drawn)
