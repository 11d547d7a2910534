"""Roles of a vocabulary's tokens (padding, BOS, byte), and errors of bad metadata."""

import copy
from datetime import UTC, datetime

import numpy as np
import pytest
from gguf import TokenType
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.llama_cpp import LlamaCpp
from tests.text.small import (
    CONTROL,
    NORMAL,
    USER_DEFINED,
    byte_level,
    pieces_of,
    sentencepiece,
    tokenizer_of,
    write_model,
)
from worker import runtime
from worker.config import EngineSection, ModelSection
from worker.engine import Sequence
from worker.errors import ModelLoadFailed, WorkerError
from worker.sampling import Sampling
from worker.text.tokenizer import load_tokenizer


def test_metadata_arrays_may_be_numpy_arrays():
    metadata = sentencepiece()
    arrays = {
        "tokenizer.ggml.token_type": np.array(metadata["tokenizer.ggml.token_type"], np.int32),
        "tokenizer.ggml.scores": np.array(metadata["tokenizer.ggml.scores"], np.float32),
    }
    assert tokenizer_of(metadata, **arrays).encode("hell") == tokenizer_of(metadata).encode("hell")


def test_padding_rows_are_unused_or_empty_or_have_a_padding_name_and_are_not_normal():
    rows = [("a row", TokenType.UNUSED), ("", CONTROL), ("[PAD7]", USER_DEFINED), ("<|pad_12|>", TokenType.UNKNOWN)]
    kept = [("[PAD8]", NORMAL), ("[PAD]", CONTROL), ("<|pad_x|>", CONTROL)]
    vocab = tokenizer_of(byte_level(names=(), extra=rows + kept)).vocab
    assert vocab.padding_ids == frozenset(range(259, 263))
    assert vocab.special.keys() == {"[PAD]", "<|pad_x|>"}


def test_a_metadata_id_past_the_end_of_the_vocabulary_is_ignored():
    vocab = tokenizer_of(byte_level(names=(), eos_token_id=151643, bos_token_id=151643)).vocab
    assert (vocab.end_ids, vocab.bos_id) == (frozenset(), None)


def test_suppressed_tokens_are_not_sampled_as_in_llama_cpp(tmp_path):
    prompt, suppressed = [72, 69, 3], []
    for _ in range(3):
        metadata = byte_level(**{"suppress_tokens": suppressed} if suppressed else {})
        path = write_model(tmp_path / "model.gguf", metadata)
        model = runtime.load(path, ModelSection(), EngineSection(backend="cpu"))
        model.engine.add(Sequence("a", prompt, 4, Sampling(temperature=0, logprobs=4)))
        draws = []
        while not model.engine.idle:
            draws += [token.draw for token in model.engine.step()]
        with LlamaCpp(path) as llama_cpp:
            assert [draw.id for draw in draws] == llama_cpp.complete(prompt, 4)
        assert not {draw.id for draw in draws} & set(suppressed)
        assert not suppressed or draws[0].top[0][0] == suppressed[0]
        suppressed.append(draws[0].id)


@pytest.mark.parametrize("value", [[-1, 70000], (), np.array([], np.int32)])
def test_suppressed_tokens_outside_the_vocabulary_are_ignored(value):
    assert tokenizer_of(byte_level(suppress_tokens=value)).vocab.suppressed_ids == frozenset()


@pytest.mark.parametrize(
    ("metadata", "added"),
    [
        (sentencepiece(), True),
        (sentencepiece(add_bos_token=False), False),
        (byte_level(bos_token_id=0), False),
        (byte_level(bos_token_id=0, add_bos_token=True), True),
        (byte_level(bos_token_id=0, pre="llama-bpe"), True),
        (byte_level(bos_token_id=0, pre="llama-bpe", add_bos_token=False), False),
    ],
)
def test_bos_is_added_by_the_file_s_flag_or_else_the_pre_tokenizer_s_default(metadata, added):
    tokenizer = tokenizer_of(metadata)
    assert tokenizer.vocab.add_bos is added
    assert (tokenizer.encode_prompt("he")[0] == tokenizer.vocab.bos_id) is added
    assert tokenizer.encode("he")[0] != tokenizer.vocab.bos_id


def test_a_prompt_has_exactly_one_bos():
    tokenizer = tokenizer_of(sentencepiece())
    once = [1, *tokenizer.encode("hell")]
    assert [tokenizer.encode_prompt(text) for text in ("hell", "<s>hell", "<s><s>hell")] == [once] * 3
    assert tokenizer.encode_prompt("") == tokenizer.encode_prompt("<s>") == [1]
    assert tokenizer.encode_prompt("<s>hell", special=False) == [1, *tokenizer.encode("<s>hell")]


def test_a_file_that_adds_bos_without_a_bos_token_is_refused():
    with pytest.raises(ModelLoadFailed, match="bos_token_id"):
        tokenizer_of(byte_level(add_bos_token=True))


def test_control_end_and_padding_tokens_have_no_bytes():
    rows = [("[PAD1]", USER_DEFINED), ("<tool>", USER_DEFINED), ("</s>", USER_DEFINED), ("<|x|>", CONTROL)]
    tokenizer = tokenizer_of(byte_level(names=(), extra=rows))
    assert [tokenizer.token_bytes(i) for i in range(259, 264)] == [b"", b"<tool>", b"", b"", b""]
    assert b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode("hé\0\n hell")) == "hé\0\n hell".encode()
    assert pieces_of(tokenizer, [256, 262, 9999]) == ["he", "<|x|>", ""]


def test_sentencepiece_tokens_keep_their_space_and_byte_tokens_have_one_byte():
    tokenizer = tokenizer_of(sentencepiece())
    ids = tokenizer.encode("he\n")
    assert pieces_of(tokenizer, ids) == [" he", "\n"]
    assert tokenizer.token_bytes(3 + 0xE2) == b"\xe2"


def test_a_merge_whose_result_is_not_in_the_vocabulary_is_dropped():
    tokenizer = tokenizer_of(byte_level(merges=["h e", "l l", "he ll", "hell o", "x y"]))
    assert pieces_of(tokenizer, tokenizer.encode("helloxy")) == ["hell", "o", "x", "y"]


def test_a_byte_that_the_vocabulary_lacks_separates_its_neighbours():
    metadata = byte_level()
    tokens = metadata["tokenizer.ggml.tokens"] = list(metadata["tokenizer.ggml.tokens"])
    tokens[ord("z")] = "zz"
    tokenizer = tokenizer_of(metadata)
    assert pieces_of(tokenizer, tokenizer.encode("hze")) == ["h", "e"]


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model"),
        ({"tokens": []}, "tokenizer.ggml.tokens"),
        ({"tokens": ["a", 7]}, "tokenizer.ggml.tokens"),
        ({"tokens": ["a\udcff"]}, "tokenizer.ggml.tokens"),
        ({"token_type": [1, 1]}, "tokenizer.ggml.token_type"),
        ({"token_type": ["1"] * 262}, "tokenizer.ggml.token_type"),
        ({"merges": None}, "tokenizer.ggml.merges"),
        ({"merges": ["he"]}, "tokenizer.ggml.merges"),
        ({"suppress_tokens": ["1"]}, "tokenizer.ggml.suppress_tokens"),
        ({"suppress_tokens": 1}, "tokenizer.ggml.suppress_tokens"),
        ({"bos_token_id": "1"}, "tokenizer.ggml.bos_token_id"),
        ({"add_bos_token": "yes"}, "tokenizer.ggml.add_bos_token"),
    ],
)
def test_a_bad_value_is_reported_with_its_key(change, where):
    with pytest.raises(ModelLoadFailed) as failure:
        tokenizer_of(byte_level(**change))
    assert failure.value.details["where"] == where


@pytest.mark.parametrize(
    ("row", "what"),
    [(("h", NORMAL), "the token 'h' occurs twice"), (("<0xZZ>", TokenType.BYTE), "the byte token 259 is '<0xZZ>'")],
)
def test_a_bad_row_is_reported(row, what):
    with pytest.raises(ModelLoadFailed, match=what):
        tokenizer_of(byte_level(names=(), extra=[row]))


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.text(max_size=4), max_size=300),
    st.lists(st.integers(-1, 300) | st.floats(), max_size=300),
    st.lists(st.sampled_from(["a", 1, None, [], "h e", "he ll"]), max_size=300),
)
WHOLE = {"byte_level": byte_level(), "sentencepiece": sentencepiece(chat_template="{{ messages }}")}


@settings(max_examples=400)
@given(st.sampled_from(sorted(WHOLE)), st.data())
def test_mutated_metadata_either_works_or_raises_a_worker_error(kind, data):
    metadata = copy.deepcopy(WHOLE[kind])
    key = data.draw(st.sampled_from(sorted(metadata)))
    if isinstance(metadata[key], list) and data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(metadata[key]) - 1))
        metadata[key][at] = data.draw(ANYTHING | st.sampled_from(metadata[key]))
    else:
        metadata[key] = data.draw(ANYTHING)
    try:
        tokenizer = load_tokenizer(metadata)
    except ModelLoadFailed:
        return
    try:
        ids = tokenizer.encode_prompt("hell hé<|im_end|>\n")
        ids += tokenizer.encode_chat([{"role": "user", "content": "h<|im_end|"}], now=datetime.now(UTC))
    except WorkerError:
        return
    assert all(0 <= token_id < tokenizer.vocab.size for token_id in ids)
    assert all(isinstance(tokenizer.token_bytes(token_id), bytes) for token_id in range(tokenizer.vocab.size))
