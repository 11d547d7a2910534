"""BPE of characters, the kind `gemma4`, against llama.cpp's ids."""

from __future__ import annotations

import pytest
from gguf import TokenType
from tokenizers import Tokenizer, models, trainers

from tests.llama_cpp import LlamaCpp
from tests.text.pre_tokenizer_cases import merges_of, texts
from tests.text.small import BYTE, CONTROL, NORMAL, USER_DEFINED, tokenizer_of, write_model
from worker.text.vocabulary import BYTE_NAMES

NEWLINES = ["\n" * count for count in range(1, 8)]
LINES = ["he\nhe", "lo\n\n", " \n \n", *NEWLINES, "\r\n", "<0x0A>", "", " ", "a▁b", "\0", "<eos>", "<|tool>a<turn|>"]
NO_TOKEN = "日👩1"
"""Characters without tokens in the vocabulary."""


def trained_metadata(without_bytes=()):
    """A vocabulary trained on the texts as whole lines, with runs of 3 and 5 newlines that no merge makes."""
    trained = Tokenizer(models.BPE())
    lines = [line.replace(" ", "▁") for text in texts() for line in text.split("\n")]
    alphabet = sorted({*"".join(lines), "▁"} - set(NO_TOKEN))
    settings = {"vocab_size": 3000, "limit_alphabet": len(alphabet), "initial_alphabet": alphabet}
    trained.train_from_iterator(lines, trainers.BpeTrainer(**settings, show_progress=False, special_tokens=[]))
    learned = [token for token, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    kept = [token for token in learned if not set(token) & set(NO_TOKEN)]
    rows = [(name, CONTROL) for name in ("<pad>", "<eos>", "<bos>", "<unk>", "<turn|>")] + [("<|tool>", USER_DEFINED)]
    rows += [(name, BYTE) for name in BYTE_NAMES if name not in without_bytes]
    rows += [(token, NORMAL) for token in (*kept, "\n", "\n\n", "\n\n\n", "\n\n\n\n\n")]
    return {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": [token for token, _ in rows],
        "tokenizer.ggml.token_type": [int(kind) for _, kind in rows],
        "tokenizer.ggml.merges": [*merges_of(trained), "\n \n"],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
    }


@pytest.mark.parametrize("without", [(), ("<0xE6>", "<0x31>"), BYTE_NAMES], ids=["all bytes", "some bytes", "no bytes"])
def test_the_ids_are_those_of_llama_cpp(without, tmp_path):
    metadata = trained_metadata(without)
    tokenizer, cases = tokenizer_of(metadata), [*texts(), *LINES, NO_TOKEN]
    with LlamaCpp(write_model(tmp_path / "model.gguf", metadata)) as llama_cpp:
        expected = {text: llama_cpp.tokenize(text) for text in cases}
    assert len(expected) > 260
    assert {text: tokenizer.encode(text) for text in cases} == expected
    if not without:
        assert all(b"".join(map(tokenizer.token_bytes, ids)) == text.encode() for text, ids in expected.items()
                   if not {"<turn|>", "▁"} & {text, *text})  # fmt: skip


@pytest.mark.parametrize(
    "keys", [{}, {"add_bos_token": False}, {"pre": "qwen2"}, {"pre": "x"}, {"add_space_prefix": True}]
)
def test_bos_spaces_and_lines_do_not_depend_on_keys_of_other_kinds(keys, tmp_path):
    metadata = trained_metadata() | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    tokenizer = tokenizer_of(metadata)
    with LlamaCpp(write_model(tmp_path / "model.gguf", metadata)) as llama_cpp:
        for text in ("hello 12", " x", "<turn|> a\n\n"):
            assert tokenizer.encode_prompt(text) == llama_cpp.tokenize(text, bos=True, special=True)


@pytest.mark.parametrize("kind", [NORMAL, TokenType.UNUSED])
def test_byte_tokens_are_found_by_name_whatever_their_type(kind):
    metadata = trained_metadata()
    named = dict.fromkeys(BYTE_NAMES, int(kind))
    rows = zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True)
    retyped = tokenizer_of(metadata | {"tokenizer.ggml.token_type": [named.get(token, row) for token, row in rows]})
    ids = retyped.encode(NO_TOKEN)
    assert ids == tokenizer_of(metadata).encode(NO_TOKEN)
    assert b"".join(map(retyped.token_bytes, ids)) == NO_TOKEN.encode()
