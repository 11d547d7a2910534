"""Ids of every pre-tokenizer name over one vocabulary, against llama.cpp's and tiktoken's."""

from __future__ import annotations

import pytest

from tests.text.pre_tokenizer_cases import TIKTOKEN, ids_of_llama_cpp, ids_of_tiktoken, trained_metadata
from tests.text.small import tokenizer_of
from worker.text.pre_tokenizers import PRE_TOKENIZERS


@pytest.fixture(scope="module")
def metadata():
    return trained_metadata()


@pytest.mark.parametrize("pre", [pre for pre in PRE_TOKENIZERS if pre not in TIKTOKEN])
def test_the_ids_are_those_of_llama_cpp(pre, metadata, tmp_path):
    tokenizer = tokenizer_of(metadata | {"tokenizer.ggml.pre": pre})
    expected, with_bos = ids_of_llama_cpp(pre, metadata, tmp_path)
    assert {text: tokenizer.encode(text) for text in expected} == expected
    assert len(with_bos) == 1 + PRE_TOKENIZERS[pre].add_bos


@pytest.mark.parametrize("pre", TIKTOKEN)
def test_the_ids_are_those_of_tiktoken(pre, metadata):
    tokenizer = tokenizer_of(metadata | {"tokenizer.ggml.pre": pre})
    expected = ids_of_tiktoken(pre, metadata)
    assert {text: tokenizer.encode(text) for text in expected} == expected


def test_digits_of_tiny_aya_are_grouped_from_the_right_where_a_number_ends_a_word(metadata):
    tokenizer = tokenizer_of(metadata | {"tokenizer.ggml.pre": "tiny_aya"})
    groups = [tokenizer.encode(text) for text in ("1", "234", "567")]
    assert tokenizer.encode("1234567") == [token for group in groups for token in group]
