"""Vocabularies of real models against llama.cpp's test strings and other tokenizers."""

import random

import pytest
import tiktoken

from tests.text.conftest import VOCABULARIES
from worker.errors import InvalidRequest
from worker.gguf_file import GgufFile
from worker.text.bpe import byte_alphabet
from worker.text.tokenizer import load_tokenizer

O200K_HARMONY = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
RANKS = 199998


def strings_and_ids(name: str) -> list[tuple[str, list[int]]]:
    raw = (VOCABULARIES / f"{name}.inp").read_bytes().decode()
    strings = raw.removesuffix("\n__ggml_vocab_test__\n").split("\n__ggml_vocab_test__\n")
    lines = (VOCABULARIES / f"{name}.out").read_text().splitlines()
    return list(zip(strings, ([int(token_id) for token_id in line.split()] for line in lines), strict=True))


@pytest.mark.parametrize("name", ["qwen2", "phi-3"])
def test_every_string_of_the_vocabulary_s_test_file_has_the_expected_ids(name, request):
    tokenizer = request.getfixturevalue(name.replace("-", ""))
    cases = strings_and_ids(name)
    assert len(cases) == 46
    assert [tokenizer.encode(text) for text, _ in cases] == [ids for _, ids in cases]


@pytest.fixture(scope="module")
def o200k(metadata_of):
    """OpenAI's BPE over the same ranks: token i of the vocabulary is rank i."""
    byte_of = {char: byte for byte, char in enumerate(byte_alphabet())}
    tokens = metadata_of("gpt-oss")["tokenizer.ggml.tokens"][:RANKS]
    ranks = {bytes(byte_of[char] for char in token): rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding("o200k_harmony", pat_str=O200K_HARMONY, mergeable_ranks=ranks, special_tokens={})


def some_text(rng: random.Random, words: list[str]) -> str:
    """A string from one of several generators, each for another part of the word patterns."""
    accents = [*"aeiouAEIOUnN", "\u0301", "\u0308", "\u0327", "\u20dd", "न", "\u093f", "क", "\u094d", " "]
    contractions = ["'S", "'s", "'ll", "'Re", "'VE", "'d", "'\u017f", "I", "we", "You", "'", " ", "१"]
    emoji = ["👩", "\u200d", "👧", "🏽", "🇩", "🇪", "\ufe0f", "❤", "🏴\U000e0067\U000e007f", " ", "ok"]
    digits = [*"0123456789", "½", "٣", "Ⅷ", ".", ",", " ", "x"]
    alphabets = [accents, contractions, emoji, digits]
    generators = [
        lambda: "".join(chr(c) for c in rng.choices(range(0x110000), k=30) if not 0xD800 <= c < 0xE000),
        lambda: "".join(chr(c) for c in rng.choices(range(0x20, 0x3100), k=40)),
        lambda: "".join(rng.choices(words, k=20)),
        lambda: " ".join(rng.choices(words, k=15)),
        lambda: "".join(rng.choices(" \t\n\r\u00a0\u3000\u0085\u2028a/!", k=40)),
        lambda: "".join(rng.choices(["\r\n", "\n\n", " ", "  ", "if", "(", ")", "//", "\t"], k=30)),
        lambda: "".join(rng.choices(rng.choice(alphabets), k=30)),
    ]
    return rng.choices(generators, weights=[1, 1, 1, 1, 1, 1, 4])[0]()


def test_two_thousand_random_strings_have_tiktoken_s_ids(gpt_oss, o200k):
    rng = random.Random(20)
    words = [o200k.decode([rank]) for rank in range(256, RANKS, 97)]
    texts = [some_text(rng, words) for _ in range(2000)]
    assert [text for text in texts if gpt_oss.encode(text) != o200k.encode_ordinary(text)] == []


def test_end_tokens_are_those_that_end_a_chat_turn(qwen2, phi3, gpt_oss):
    def names(tokenizer):
        return {tokenizer.vocab.tokens[token_id] for token_id in tokenizer.vocab.end_ids}

    assert names(qwen2) == {"<|endoftext|>", "<|im_end|>", "</s>"}  # the last as in llama.cpp
    assert names(phi3) == {"<|endoftext|>", "<|end|>", "</s>"}
    assert names(gpt_oss) == {"<|endoftext|>", "<|return|>", "<|call|>"}


def test_padding_rows_are_recognized_and_never_encoded(qwen2, phi3):
    assert qwen2.vocab.padding_ids == frozenset(range(151646, 151936))
    assert phi3.vocab.padding_ids == frozenset(range(32011, 32064))
    for tokenizer, row in ((qwen2, 151646), (phi3, 32011)):
        ids = tokenizer.encode(tokenizer.vocab.tokens[row], special=True)
        assert len(ids) > 1
        assert tokenizer.vocab.padding_ids.isdisjoint(ids)
        assert tokenizer.token_bytes(row) == b""


def test_im_start_is_one_token_if_special_and_six_if_not(qwen2):
    assert qwen2.encode("<|im_start|>", special=True) == [151644]
    assert qwen2.encode("<|im_start|>") == [27, 91, 318, 4906, 91, 29]


def test_white_space_after_phi_3_s_special_tokens_is_stripped_as_in_llama_server(phi3):
    user, end, hello = 32010, 32007, 15043
    assert phi3.encode("<|user|>\nHello<|end|>", special=True) == [user, hello, end]
    assert phi3.encode("<|user|> \t\n<|end|>", special=True) == [user, end]
    assert phi3.encode("<s> Hello", special=True) == [1, 29871, hello]  # <s> is an exception


def test_a_model_of_another_name_keeps_the_white_space_after_special_tokens(metadata_of):
    other = load_tokenizer({**metadata_of("phi-3"), "general.name": "Another"})
    assert other.encode("<|user|>\nHello<|end|>", special=True) == [32010, 29871, 13, 10994, 32007]


@pytest.mark.parametrize("name", ["qwen2", "phi3"])
def test_a_lone_surrogate_is_refused_in_one_sentence(name, request):
    tokenizer = request.getfixturevalue(name)
    with pytest.raises(InvalidRequest, match="U\\+D83D"):
        tokenizer.encode("half an emoji: \ud83d")


def test_smollm2_s_file_gives_llama_cpp_s_ids(smollm2):
    with GgufFile.open(smollm2) as file:
        tokenizer = load_tokenizer(file.metadata)
    ids_of = {
        "Hello, y'all! 1234 x\n\n  we're": [19556, 28, 329, 23, 449, 17, 216, 33, 34, 35, 36, 1792, 8866, 392, 2316],
        "def f(x):\r\n\treturn x[10:20]": [1604, 275, 24, 104, 727, 2738, 197, 5406, 1792, 75, 33, 32, 42, 34, 32, 77],
        "<|im_start|>user\nHi<|im_end|>\n": [1, 4093, 198, 26843, 2, 198],
    }
    assert {text: tokenizer.encode(text, special=True) for text in ids_of} == ids_of
