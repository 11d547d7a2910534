"""Strings, a vocabulary and reference ids for every pre-tokenizer name.

The vocabulary's merges cross all borders of words, so that a word that is split elsewhere has other
ids. llama.cpp departs from the models' own tokenizers in these cases, which the strings leave out:

* It matches several categories of letters as one: `camelCase` is not split, combining marks are.
  tiktoken, whose syntax of patterns has the categories, is the reference instead.
* Whitespace outside ASCII matches no literal range, and `\\d` matches only ASCII digits.
* Its grouping of digits for `tiny_aya` joins the first group with the text before it.
"""

from __future__ import annotations

import json
import random

import tiktoken
from tokenizers import Tokenizer, models, trainers

from tests.llama_cpp import LlamaCpp
from tests.text.small import CONTROL, NORMAL, byte_level, write_model
from worker.text.bpe import byte_alphabet

ASCII = [
    *("It's", "WE'LL", "I'M", "'re", "can't", "'S", "hello", "World", "HTTPServer", "x1", "3.14", "1234567", "12"),
    *("2024-01-02", "007", "1,000,000", "_", "__init__", "==", "!=", "->", "...", "?!", "(a)", "[b]", "{c}", '"q"'),
    *("`code`", "$x", "a+b", "#!", "/usr/bin", "//", "\\n", "~", "^", "|", "<tag>", "d'oh", "IMGIMGABZ"),
    *(" ", "  ", "   ", "     ", "         ", "\n", "\n\n", "\r\n", "\t", "\t\t", " \n", " \n ", "<sentinel:1>"),
]
SYMBOLS = ["👩‍👧", "😀", "🇩🇪", "…", "—", "“q”", "。", "，", "！", "\u200b"]
LETTERS = ["中文字符", "日本語", "ひらがな", "カタカナ", "한국어", "ไทย", "عربي", "ㄅㄆ", "、"]
CASED = ["camelCase", "ελ", "éa", "ñ", "über", "Привет", "мир", "l'eau", "Don’T", "ａｂ", "Ａ", "ǅ", "ʰ", "𝒳", "ß", "µ"]
MARKS = ["a\u0301e", "न\u093f"]
DIGITS = ["१२३", "①", "½", "²", "𝟘"]
SPACES = ["\u00a0", "\u3000"]
ALL = [*ASCII, *SYMBOLS, *LETTERS, *CASED, *MARKS, *DIGITS, *SPACES]
LEFT_OUT = {
    "deepseek-llm": SPACES,
    "deepseek-coder": SPACES,
    "superbpe": DIGITS,
    "tiny_aya": [*CASED, *MARKS, *LETTERS, *(part for part in ALL if any(map(str.isnumeric, part)))],
    "youtu": [*CASED, *MARKS, *LETTERS],
}
LEFT_OUT["cohere2moe"] = LEFT_OUT["tiny_aya"]
BEFORE = r"[^\r\n\p{L}\p{N}]?"
SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
ENDINGS = (r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+")
KIMI_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
KIMI_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (
    rf"{BEFORE}{UPPER}*{LOWER}+{SUFFIX}",
    rf"{BEFORE}{UPPER}+{LOWER}*{SUFFIX}",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    *ENDINGS,
)
TIKTOKEN = {
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2", "talkie"), O200K),
    "tekken": (
        rf"{BEFORE}{UPPER}*{LOWER}+",
        rf"{BEFORE}{UPPER}+{LOWER}*",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        *ENDINGS,
    ),
    "kimi-k2": (
        r"[\p{Han}]+",
        rf"{BEFORE}{KIMI_UPPER}*{KIMI_LOWER}+{SUFFIX}",
        rf"{BEFORE}{KIMI_UPPER}+{KIMI_LOWER}*{SUFFIX}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        *ENDINGS,
    ),
}


def texts(left_out=()):
    rng = random.Random(5)
    parts = [part for part in ALL if part not in left_out]
    return ["".join(rng.choices(parts, k=rng.randint(1, 12))) for _ in range(250)]


def trained_metadata():
    """A vocabulary trained on the texts as whole words."""
    alphabet = byte_alphabet()
    corpus = ["".join(alphabet[byte] for byte in text.encode()) for text in texts()]
    trained = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=8000, initial_alphabet=alphabet, show_progress=False, min_frequency=2, special_tokens=[]
    )
    trained.train_from_iterator(corpus, trainer)
    tokens = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    joined = [token for token, _ in tokens if len(token) > 1]
    merges = merges_of(trained)
    extra = [(token, NORMAL) for token in joined if token not in ("he", "ll", "hell")]
    made = byte_level(names=(), extra=[*extra, ("<s>", CONTROL)])
    return made | {
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(made["tokenizer.ggml.tokens"]) - 1,
    }


def merges_of(trained):
    merges = json.loads(trained.to_str())["model"]["merges"]
    return [" ".join(pair) if isinstance(pair, list) else pair for pair in merges]


def ids_of_llama_cpp(pre, metadata, folder):
    """llama.cpp's ids of each case, and of "a" with BOS."""
    named = metadata | {"tokenizer.ggml.pre": pre}
    with LlamaCpp(write_model(folder / "model.gguf", named)) as llama_cpp:
        expected = {text: llama_cpp.tokenize(text) for text in texts(LEFT_OUT.get(pre, ()))}
        return expected, llama_cpp.tokenize("a", bos=True)


def ids_of_tiktoken(pre, metadata):
    """tiktoken's ids of each case, with the pattern of the model's own tokenizer."""
    byte_of = {char: byte for byte, char in enumerate(byte_alphabet())}
    ids = {token: row for row, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    ordered = [*byte_alphabet(), *(merge.replace(" ", "") for merge in metadata["tokenizer.ggml.merges"])]
    ranks = {bytes(map(byte_of.__getitem__, token)): rank for rank, token in enumerate(ordered)}
    encoding = tiktoken.Encoding(pre, pat_str="|".join(TIKTOKEN[pre]), mergeable_ranks=ranks, special_tokens={})
    return {text: [ids[ordered[rank]] for rank in encoding.encode(text)] for text in texts()}
