"""Pre-tokenizers of byte-level vocabularies, by `tokenizer.ggml.pre`: patterns of words.

The patterns are those of the models' own tokenizers (OpenAI's tiktoken for gpt-2 and gpt-4o, the
tokenizer.json of the others); `default` is llama.cpp's, for files older than the key. They apply in
order, each within the splits of the previous one; unmatched text is a split too.
"""

from dataclasses import dataclass

from worker.errors import ModelLoadFailed

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LETTERS_AND_SYMBOLS = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|{digits}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """Split patterns, and two properties of the tokenizers that use them."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    """A word that is a token is encoded as that token, without merges."""
    add_bos: bool = False
    """The default of `tokenizer.ggml.add_bos_token`."""


_LLAMA3 = PreTokenizer((_LETTERS_AND_SYMBOLS.replace("{digits}", r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True)
_QWEN2 = PreTokenizer((_LETTERS_AND_SYMBOLS.replace("{digits}", r"\p{N}"),))

PRE_TOKENIZERS = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": PreTokenizer((_GPT2,)),
    "gpt-4o": PreTokenizer((_O200K,)),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "smollm": PreTokenizer((r"\p{N}", _GPT2)),
}


def pre_tokenizer(pre: str) -> PreTokenizer:
    """Return the pre-tokenizer of a name. Raises ModelLoadFailed if it is unknown."""
    if pre not in PRE_TOKENIZERS:
        what, expected = f"the pre-tokenizer {pre[:60]!r} is unknown", "one of " + ", ".join(PRE_TOKENIZERS)
        raise ModelLoadFailed(what, "tokenizer.ggml.pre", expected)
    return PRE_TOKENIZERS[pre]
