"""A model's vocabulary, read from GGUF metadata: its rows, and which of them are special, padding or an answer's end.

Knows nothing of how text is cut into tokens. Read next: special_tokens.py (control tokens in text), then byte_bpe.py
and sentencepiece_bpe.py (everything else in text).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from worker.errors import ModelLoadFailed
from worker.text.metadata import Metadata
from worker.text.pre_tokenizers import pre_tokenizer

# GGUF's token types (gguf.TokenType), as plain integers: comparing 200,000 rows with enum members takes several times
# as long, and importing gguf for five numbers takes longer still.
NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6

_END_NAMES = (
    *("<|im_end|>", "<|end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>"),
    *("<|return|>", "<|call|>"),
)
_LONGEST_NAME = 1000
_PADDING_NAME = re.compile(r"\[PAD\d+\]|<\|pad_\d+\|>")
_BYTE_NAME = re.compile(r"<0x[0-9A-F]{2}>")
_PHI3_NOT_STRIPPING = ("<unk>", "<s>", "<|endoftext|>")


@dataclass(frozen=True)
class Vocabulary:
    """The rows of a vocabulary and what they mean; `tokens[i]` and `types[i]` belong to token id i."""

    kind: str
    """`gpt2` (byte-level BPE) or `llama` (SentencePiece BPE)."""
    pre: str
    """The pre-tokenizer's name; `default` where the file names none."""
    tokens: list[str]
    types: list[int]
    """GGUF token types."""
    special: dict[str, int]
    """Name → id of the tokens that are found in text whole: CONTROL and USER_DEFINED, two characters or more."""
    padding_ids: frozenset[int]
    """Rows without a token: never drawn, never found in text."""
    end_ids: frozenset[int]
    """Any of these ends an answer."""
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    """Every prompt begins with BOS."""
    add_space_prefix: bool
    """Text at the start and after a special token gets a space before it (`llama` only)."""
    strip_after_ids: frozenset[int]
    """Special tokens that swallow the white space after them."""

    @property
    def size(self) -> int:
        """The number of rows that the file names."""
        return len(self.tokens)

    def ordinary(self) -> dict[str, int]:
        """Token → id of the rows that ordinary text may become; one per token, or ModelLoadFailed."""
        others = self.padding_ids.union(i for i, kind in enumerate(self.types) if kind not in (NORMAL, BYTE))
        ids = dict(zip(self.tokens, range(self.size), strict=True))
        if len(ids) == self.size:
            for i in others:
                del ids[self.tokens[i]]
            return ids
        rows = [i for i in range(self.size) if i not in others]
        ids = {self.tokens[i]: i for i in rows}
        if len(ids) < len(rows):
            twice = next(self.tokens[i] for i in rows if ids[self.tokens[i]] != i)
            raise ModelLoadFailed(
                f"the token {twice[:60]!r} is there twice", "tokenizer.ggml.tokens", "distinct tokens"
            )
        return ids


def read_vocabulary(metadata: Metadata) -> Vocabulary:
    """Read the vocabulary of a file. Raises ModelLoadFailed for a kind, pre-tokenizer or value it can't serve."""
    kind, pre = metadata.text("tokenizer.ggml.model", ""), metadata.text("tokenizer.ggml.pre", "default")
    if kind not in ("gpt2", "llama"):
        what = f"the tokenizer kind {kind[:60]!r} is unknown" if kind else "it is missing"
        raise ModelLoadFailed(what, "tokenizer.ggml.model", "gpt2 or llama")
    spm = kind == "llama"
    tokens = metadata.strings("tokenizer.ggml.tokens")
    types = metadata.numbers("tokenizer.ggml.token_type", len(tokens), NORMAL)
    marked = [i for i, kind in enumerate(types) if kind != NORMAL or not tokens[i]]
    _check_byte_tokens(tokens, types, marked)
    padding = frozenset(_padding(tokens, types, marked))
    special = _special(tokens, types, [i for i in marked if i not in padding])
    bos_id = metadata.row("tokenizer.ggml.bos_token_id", len(tokens))
    if bos_id is None and spm and len(tokens) > 1:
        bos_id = 1  # SentencePiece's own default, for files that leave it out
    return Vocabulary(
        kind=kind,
        pre=pre,
        tokens=tokens,
        types=types,
        special=special,
        padding_ids=padding,
        end_ids=_end_ids(metadata, special, len(tokens)),
        bos_id=bos_id,
        eos_id=metadata.row("tokenizer.ggml.eos_token_id", len(tokens)),
        add_bos=_add_bos(metadata, bos_id, spm or pre_tokenizer(pre).add_bos),
        add_space_prefix=spm and metadata.flag("tokenizer.ggml.add_space_prefix", True),
        strip_after_ids=_strip_after_ids(metadata, special) if spm else frozenset(),
    )


def _check_byte_tokens(tokens: list[str], types: list[int], marked: list[int]) -> None:
    for i in marked:
        if types[i] == BYTE and not _BYTE_NAME.fullmatch(tokens[i]):
            what = f"the byte token {i} is {tokens[i][:60]!r}"
            raise ModelLoadFailed(what, "tokenizer.ggml.tokens", "a name like <0x0A>")


def _padding(tokens: list[str], types: list[int], marked: list[int]) -> Iterable[int]:
    for i in marked:
        if types[i] == UNUSED or not tokens[i] or (types[i] != NORMAL and _PADDING_NAME.fullmatch(tokens[i])):
            yield i


def _special(tokens: list[str], types: list[int], marked: list[int]) -> dict[str, int]:
    # A name of one character is left out: nothing could be put inside it to keep a user's text from becoming it.
    special = {tokens[i]: i for i in marked if types[i] in (CONTROL, USER_DEFINED) and len(tokens[i]) > 1}
    longest = max(special, key=len, default="")
    if len(longest) > _LONGEST_NAME:
        what = f"the special token {special[longest]} has {len(longest)} characters"
        raise ModelLoadFailed(what, "tokenizer.ggml.tokens", f"{_LONGEST_NAME} at the most")
    return special


def _end_ids(metadata: Metadata, special: dict[str, int], rows: int) -> frozenset[int]:
    ends = {metadata.row(f"tokenizer.ggml.{name}_token_id", rows) for name in ("eos", "eot", "eom")}
    ends |= {special.get(name) for name in _END_NAMES}
    if "<|return|>" in special and "<|call|>" in special:  # harmony: <|end|> closes a message, not the answer
        ends.discard(special.get("<|end|>"))
    return frozenset(end for end in ends if end is not None)


def _add_bos(metadata: Metadata, bos_id: int | None, default: bool) -> bool:
    add_bos = metadata.flag("tokenizer.ggml.add_bos_token", default)
    if add_bos and bos_id is None:
        raise ModelLoadFailed("there is no BOS token to add", "tokenizer.ggml.bos_token_id", "a row of the vocabulary")
    return add_bos


def _strip_after_ids(metadata: Metadata, special: dict[str, int]) -> frozenset[int]:
    # GGUF doesn't carry this attribute of HF's Phi-3 tokenizers: llama.cpp goes by the model's name, and so do we.
    name = metadata.text("general.name", "").lower()
    if "phi-3" not in name and "phi3" not in name:
        return frozenset()
    return frozenset(i for token, i in special.items() if token not in _PHI3_NOT_STRIPPING)
