"""The split into words of each pre-tokenizer, against expected values."""

import pytest
import tokenizers

from tests.llama_cpp import LlamaCpp
from tests.text.small import NORMAL, byte_level, pieces_of, tokenizer_of, write_model
from worker.errors import InvalidRequest, ModelLoadFailed
from worker.text.bpe import byte_alphabet
from worker.text.pre_tokenizers import PRE_TOKENIZERS

TEXT = "It'S  Ab\r\n1234 x_=!\n\n"


def words(pre: str, text: str) -> list[str]:
    """The words of a text, by a vocabulary whose merges join all characters of a word."""
    chars = "".join(byte_alphabet()[byte] for byte in text.encode())
    prefixes = dict.fromkeys(
        chars[start:end] for start in range(len(chars)) for end in range(start + 2, len(chars) + 1)
    )
    extra = [(token, NORMAL) for token in prefixes]
    merges = [f"{token[:-1]} {token[-1]}" for token in prefixes]
    tokenizer = tokenizer_of(byte_level(pre=pre, names=(), extra=extra, merges=merges, add_bos_token=False))
    return pieces_of(tokenizer, tokenizer.encode(text))


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["It", "'", "S", " ", " Ab", "\r", "\n", "1234", " x", "_=!", "\n\n"]),
        ("qwen2", ["It", "'S", " ", " Ab", "\r\n", "1", "2", "3", "4", " x", "_=!\n\n"]),
        ("llama-bpe", ["It", "'S", " ", " Ab", "\r\n", "123", "4", " x", "_=!\n\n"]),
        ("gpt-4o", ["It'S", " ", " Ab", "\r\n", "123", "4", " x", "_=!\n\n"]),
        ("smollm", ["It", "'", "S", " ", " Ab", "\r\n", "1", "2", "3", "4", " x", "_=!", "\n\n"]),
        ("default", ["It", "'", "S", " ", " Ab", "\r", "\n", "123", "4", " x", "_=!", "\n\n"]),
    ],
)
def test_each_pre_tokenizer_splits_a_text_into_the_expected_words(pre, expected):
    assert words(pre, TEXT) == expected


def test_only_llama_3_s_pre_tokenizer_ignores_merges_for_a_word_that_is_a_token():
    extra = [("ab", NORMAL), ("bc", NORMAL), ("abc", NORMAL)]
    metadata = byte_level(extra=extra, merges=["b c", "a b", "ab c"], bos_token_id=0)
    gpt2, llama3 = (tokenizer_of(metadata, **{"tokenizer.ggml.pre": pre}) for pre in ("gpt-2", "llama-bpe"))
    assert pieces_of(gpt2, gpt2.encode("abc")) == ["a", "bc"]
    assert pieces_of(llama3, llama3.encode("abc")) == ["abc"]


def test_names_of_one_pre_tokenizer_share_an_entry():
    assert PRE_TOKENIZERS["llama3"] is PRE_TOKENIZERS["llama-v3"] is PRE_TOKENIZERS["llama-bpe"]


def test_an_unknown_pre_tokenizer_is_refused_by_name():
    with pytest.raises(
        ModelLoadFailed, match=r"tokenizer\.ggml\.pre: the pre-tokenizer 'no-such' is unknown; expected"
    ):
        tokenizer_of(byte_level(pre="no-such"))


def test_a_file_without_the_key_or_with_an_empty_one_uses_the_default(tmp_path):
    merges = ["1 2", "12 3", "123 4", "1234 5", "_ =", "Ċ Ċ", "Ġ A"]
    extra = [(merge.replace(" ", ""), NORMAL) for merge in merges]
    metadata = byte_level(extra=extra, merges=merges)
    del metadata["tokenizer.ggml.pre"]
    tokenizer = tokenizer_of(metadata)
    assert tokenizer.vocab.pre == tokenizer_of(metadata | {"tokenizer.ggml.pre": ""}).vocab.pre == "default"
    with LlamaCpp(write_model(tmp_path / "model.gguf", metadata | {"tokenizer.ggml.pre": ""})) as llama_cpp:
        assert llama_cpp.tokenize("12345 A_=\n\n A") == tokenizer.encode("12345 A_=\n\n A")


@pytest.mark.parametrize("char", ["A", " "])
def test_a_word_that_is_too_long_for_the_library_is_refused_and_the_next_text_is_not(char):
    tokenizer = tokenizer_of(byte_level(pre="gpt-4o"))
    with pytest.raises(InvalidRequest, match="words of millions of characters"):
        tokenizer.encode(char * 11_000_000)
    assert pieces_of(tokenizer, tokenizer.encode("hell A")) == ["hell", " ", "A"]


def test_a_vocabulary_at_which_the_library_panics_is_refused(monkeypatch):
    panic = type("PanicException", (BaseException,), {})

    def raise_panic(**_):
        raise panic("index out of bounds")

    monkeypatch.setattr(tokenizers.models, "BPE", raise_panic)
    with pytest.raises(ModelLoadFailed, match="index out of bounds"):
        tokenizer_of(byte_level())
    monkeypatch.setattr(tokenizers.models, "BPE", lambda **_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tokenizer_of(byte_level())
