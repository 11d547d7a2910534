"""SentencePiece BPE against a naive merge of the best pair, and the space prefix."""

from itertools import pairwise

import pytest
from gguf import TokenType
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.llama_cpp import LlamaCpp
from tests.text.small import CONTROL, NORMAL, USER_DEFINED, pieces_of, sentencepiece, tokenizer_of, write_model
from worker.errors import InvalidRequest, ModelLoadFailed
from worker.text.vocabulary import BYTE_NAMES


def naive_merge(text: str, ids: dict[str, int], scores: list[float]) -> list[int]:
    """Merge the pair with the highest score, the leftmost of equals, until none is a piece."""
    symbols = list(text.replace(" ", "▁"))
    while True:
        pairs = [(scores[ids[a + b]], -at) for at, (a, b) in enumerate(pairwise(symbols)) if a + b in ids]
        if not pairs:
            break
        at = -max(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return [i for symbol in symbols for i in ([ids[symbol]] if symbol in ids else [3 + b for b in symbol.encode()])]


@pytest.fixture(scope="module")
def phi3_pieces(metadata_of):
    metadata = metadata_of("phi-3")
    tokens, types = metadata["tokenizer.ggml.tokens"], list(metadata["tokenizer.ggml.token_type"])
    ids = {token: row for row, token in enumerate(tokens) if types[row] == TokenType.NORMAL}
    return ids, [float(score) for score in metadata["tokenizer.ggml.scores"]]


WORDS = ["Hello", "▁", "  ", "\n", "ing", "tion", "é", "日本", "🙂", "<s>", "</s>", "<0x41>", "\0", "aaa", "İ"]


@settings(max_examples=300)
@given(text=st.lists(st.sampled_from(WORDS) | st.text(max_size=5) | st.text("aeinorst ", max_size=12)).map("".join))
def test_ids_are_those_of_a_naive_merge(phi3, phi3_pieces, text):
    expected = naive_merge(" " + text, *phi3_pieces) if text else []
    assert phi3.encode(text) == expected


@given(st.text("he l▁", max_size=20))
def test_pieces_of_equal_score_merge_from_the_left(text):
    metadata = sentencepiece(scores=[0.0] * 267, add_space_prefix=False)
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {token: row for row, token in enumerate(tokens) if 3 + 256 <= row < 3 + 256 + 7}
    assert tokenizer_of(metadata).encode(text) == naive_merge(text, ids, [0.0] * 267)


def test_the_space_prefix_comes_at_the_start_and_after_each_special_token():
    tokenizer = tokenizer_of(sentencepiece())
    ids = tokenizer.encode("he<|user|>he<|user|><|user|> he", special=True)
    assert pieces_of(tokenizer, ids) == [" he", "<|user|>", " he", "<|user|>", "<|user|>", " ", " he"]


def test_a_file_may_disable_the_space_prefix():
    tokenizer = tokenizer_of(sentencepiece(add_space_prefix=False))
    assert pieces_of(tokenizer, tokenizer.encode("he<|user|>he", special=True)) == ["he", "<|user|>", "he"]


def test_merges_of_plain_text_do_not_give_control_tokens():
    tokenizer = tokenizer_of(sentencepiece(pieces=("▁", "<", "s", ">", "<s", "s>"), add_space_prefix=False))
    assert pieces_of(tokenizer, tokenizer.encode("<s>")) == ["<s", ">"]


def without(metadata: dict, *names: str) -> dict:
    """The metadata without the rows of these names."""
    kept = [row for row, token in enumerate(metadata["tokenizer.ggml.tokens"]) if token not in names]
    arrays = ("tokens", "token_type", "scores")
    return metadata | {
        f"tokenizer.ggml.{key}": [metadata[f"tokenizer.ggml.{key}"][row] for row in kept] for key in arrays
    }


def test_without_byte_tokens_a_character_without_a_piece_is_refused():
    tokenizer = tokenizer_of(without(sentencepiece(), *BYTE_NAMES))
    assert pieces_of(tokenizer, tokenizer.encode("he")) == [" he"]
    with pytest.raises(InvalidRequest, match="encode"):
        tokenizer.encode("he?")


def test_a_missing_byte_is_refused_only_where_it_occurs():
    tokenizer = tokenizer_of(without(sentencepiece(), "<0x0B>"))
    assert tokenizer.encode("he\n🙂") == [
        tokenizer.vocab.ids[f"<0x{byte:02X}>"] if byte else tokenizer.vocab.ids["▁he"]
        for byte in b"\0\n\xf0\x9f\x99\x82"
    ]
    with pytest.raises(InvalidRequest, match="encode"):
        tokenizer.encode("he\v")


@pytest.mark.parametrize("kind", [NORMAL, USER_DEFINED, CONTROL, TokenType.UNUSED])
def test_byte_tokens_are_found_by_name_whatever_their_type_as_in_llama_cpp(kind, tmp_path):
    metadata, texts = sentencepiece(), ["he\n", "he🙂ll\n\n", "h<0x0A>e", "<0x0A>", "\t?"]
    typed = [
        int(kind) if token in BYTE_NAMES else row
        for token, row in zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True)
    ]
    tokenizer = tokenizer_of(metadata, **{"tokenizer.ggml.token_type": typed})
    assert [tokenizer.encode(text) for text in texts] == [tokenizer_of(metadata).encode(text) for text in texts]
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode("he🙂\n"))) == " he🙂\n".encode()
    if kind in (NORMAL, TokenType.UNUSED):  # llama.cpp takes the names of the others for special tokens
        with LlamaCpp(
            write_model(tmp_path / "model.gguf", metadata | {"tokenizer.ggml.token_type": typed})
        ) as llama_cpp:
            assert [llama_cpp.tokenize(text) for text in texts] == [tokenizer.encode(text) for text in texts]


def test_a_vocabulary_that_the_library_rejects_is_refused():
    with pytest.raises(ModelLoadFailed, match="sentencepiece can't use it"):
        tokenizer_of(sentencepiece(pieces=("a\0b",)))
