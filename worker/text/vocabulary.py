"""A model's vocabulary from GGUF metadata: tokens, types, and special, padding and end tokens.

`TokenizerMetadata` checks the types of values; `read_vocabulary` interprets them. Read next:
control_tokens.py (control and end tokens), special_tokens.py (special tokens in text), bpe.py
(ordinary text).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from worker.errors import ModelLoadFailed
from worker.gguf_file import is_unicode
from worker.text import control_tokens
from worker.text.pre_tokenizers import pre_tokenizer

T = TypeVar("T")

# gguf.TokenType as integers: comparing 200,000 rows with enum members is several times slower, and
# so is the import of gguf.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_MAX_NAME = 1000
_PADDING_NAME = re.compile(r"\[PAD\d+\]|<\|pad_\d+\|>")
KINDS = ("gpt2", "llama", "gemma4")
BYTE_NAMES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_SENTENCEPIECE_ROLES = {"bos": 1, "eos": 2}
"""Ids of a SentencePiece vocabulary whose metadata names none."""
_PHI3_NOT_STRIPPING = ("<unk>", "<s>", "<|endoftext|>")


class TokenizerMetadata:
    """Typed access to GGUF metadata: keys to Python values, arrays as lists or NumPy arrays.

    Every method raises ModelLoadFailed, naming the key, for a value of the wrong type.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def get(self, key: str, kind: type[T], default: T) -> T:
        """Return a value of the type `kind`, or `default` if the key is absent."""
        value = self._values.get(key, default)
        if not isinstance(value, kind):
            raise self._wrong(key, value, {str: "a string", bool: "a boolean"}.get(kind, "a number"))
        if kind is str and not is_unicode(str(value)):
            raise ModelLoadFailed("it is not UTF-8", key, "a UTF-8 string")
        return value

    def token_id(self, key: str, rows: int) -> int | None:
        """Return a token id, or None if the key is absent or the id is not below `rows`."""
        value = self.get(key, int, rows)
        if isinstance(value, bool) or value < 0:
            raise self._wrong(key, value, "a number, 0 or more")
        return value if value < rows else None

    def roles(self, rows: int) -> dict[str, int]:
        """Return role → id of the tokens that metadata names and the vocabulary has."""
        named = {role: self.token_id(f"tokenizer.ggml.{role}_token_id", rows) for role in control_tokens.ROLES}
        return {role: token_id for role, token_id in named.items() if token_id is not None}

    def strings(self, key: str) -> list[str]:
        """Return a required array of strings, each valid Unicode."""
        value = self._array(key)
        if not set(map(type, value)) <= {str}:
            raise self._wrong(key, value, "an array of strings")
        if not is_unicode("".join(value)):
            raise ModelLoadFailed("a string is not UTF-8", key, "an array of UTF-8 strings")
        return value

    def numbers(self, key: str, rows: int, default: float) -> list[Any]:
        """Return a number for each row, `default` for all if the key is absent."""
        if key not in self._values:
            return [default] * rows
        value = self._array(key)
        if not set(map(type, value)) <= {int, float}:
            raise self._wrong(key, value, "an array of numbers")
        if len(value) < rows:
            raise ModelLoadFailed(f"it has {len(value)} numbers", key, f"{rows}, one for each token")
        return value[:rows]

    def token_ids(self, key: str, rows: int) -> frozenset[int]:
        """Return the ids below `rows` of an array, empty if the key is absent."""
        value = self._values.get(key)
        value = [] if value is None else value.tolist() if isinstance(value, np.ndarray) else value
        if not isinstance(value, list | tuple) or not set(map(type, value)) <= {int}:
            raise self._wrong(key, value, "an array of token ids")
        return frozenset(i for i in value if 0 <= i < rows)

    def _array(self, key: str) -> list[Any]:
        value = self._values.get(key)
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if not isinstance(value, list | tuple) or not value:
            raise self._wrong(key, value, "an array that is not empty")
        return list(value)

    @staticmethod
    def _wrong(key: str, value: object, expected: str) -> ModelLoadFailed:
        what = "it is missing" if value is None else f"it is {type(value).__name__} {str(value)[:60]!r}"
        return ModelLoadFailed(what, key, expected)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a vocabulary and their roles; the index of `tokens` and `types` is the id."""

    kind: str
    """`gpt2` (byte-level BPE), `gemma4` (BPE of characters) or `llama` (SentencePiece BPE)."""
    pre: str
    """The pre-tokenizer's name; `default` if the file names none or an empty one."""
    tokens: list[str]
    types: list[int]
    """GGUF token types, after `_retype`."""
    special: dict[str, int]
    """Name → id of the CONTROL and USER_DEFINED tokens."""
    user_defined: frozenset[str]
    """The names in `special` of USER_DEFINED tokens, which are found in any text."""
    padding_ids: frozenset[int]
    """Rows without a token: never sampled, never encoded."""
    suppressed_ids: frozenset[int]
    """Tokens that the file forbids to sample."""
    end_ids: frozenset[int]
    """Tokens that end an answer."""
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    """Every prompt begins with BOS."""
    add_space_prefix: bool
    """Text at the start and after a special token is prefixed with a space (`llama` only)."""
    strip_after_ids: frozenset[int]
    """Special tokens after which white space is stripped."""

    @cached_property
    def ids(self) -> dict[str, int]:
        """Token → id; of equal tokens the last."""
        return dict(zip(self.tokens, range(self.size), strict=True))

    @property
    def size(self) -> int:
        """The number of tokens in the file."""
        return len(self.tokens)

    def control_id(self, name: str) -> int | None:
        """Return the id of the CONTROL token of this name, if there is one."""
        return None if name in self.user_defined else self.special.get(name)

    def ordinary(self) -> dict[str, int]:
        """Return token → id for ordinary text. Raises ModelLoadFailed for duplicates."""
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
            raise ModelLoadFailed(f"the token {twice[:60]!r} occurs twice", "tokenizer.ggml.tokens", "distinct tokens")
        return ids


def read_vocabulary(metadata: TokenizerMetadata) -> Vocabulary:
    """Read a file's vocabulary. ModelLoadFailed for an unsupported kind, pre-tokenizer or value."""
    kind = _kind(metadata)
    pre = "gemma4" if kind == "gemma4" else metadata.get("tokenizer.ggml.pre", str, "") or "default"
    if kind not in KINDS:
        what = f"the tokenizer kind {kind[:60]!r} is unknown" if kind else "it is missing"
        raise ModelLoadFailed(what, "tokenizer.ggml.model", " or ".join(KINDS))
    spm = kind == "llama"
    tokens = metadata.strings("tokenizer.ggml.tokens")
    names = control_tokens.CONTROL_NAMES.union(BYTE_NAMES, control_tokens.names_like_control(tokens))
    ids = {token: i for i, token in enumerate(tokens) if token in names}  # faster than a dict of all
    types = metadata.numbers("tokenizer.ggml.token_type", len(tokens), NORMAL)
    _retype(metadata, types, tokens, ids)
    marked = [i for i, kind in enumerate(types) if kind != NORMAL or not tokens[i]]
    for i in marked:
        if types[i] == BYTE and tokens[i] not in BYTE_NAMES:
            what = f"the byte token {i} is {tokens[i][:60]!r}"
            raise ModelLoadFailed(what, "tokenizer.ggml.tokens", "a name like <0x0A>")
    padding = frozenset(i for i in marked if _is_padding(tokens[i], types[i]))
    special = _special(tokens, types, [i for i in marked if i not in padding])
    roles = {**(_SENTENCEPIECE_ROLES if spm and len(tokens) > 2 else {}), **metadata.roles(len(tokens))}
    bos_id = roles.get("bos")
    return Vocabulary(
        kind=kind,
        pre=pre,
        tokens=tokens,
        types=types,
        special=special,
        user_defined=frozenset(token for token, i in special.items() if types[i] == USER_DEFINED),
        padding_ids=padding,
        suppressed_ids=metadata.token_ids("tokenizer.ggml.suppress_tokens", len(tokens)),
        end_ids=control_tokens.end_ids(roles, ids),
        bos_id=bos_id,
        eos_id=roles.get("eos"),
        add_bos=kind == "gemma4" or _add_bos(metadata, bos_id, spm or pre_tokenizer(pre).add_bos),
        add_space_prefix=spm and metadata.get("tokenizer.ggml.add_space_prefix", bool, True),
        strip_after_ids=_strip_after_ids(metadata, special) if spm else frozenset(),
    )


def _kind(metadata: TokenizerMetadata) -> str:
    """`tokenizer.ggml.model`, or `gemma4` if only `pre` says so, as in Ollama's files."""
    kind = metadata.get("tokenizer.ggml.model", str, "")
    return "gemma4" if kind == "llama" and metadata.get("tokenizer.ggml.pre", str, "") == "gemma4" else kind


def _retype(metadata: TokenizerMetadata, types: list[int], tokens: list[str], ids: Mapping[str, int]) -> None:
    """Correct the file's types, which are known to be wrong in some files.

    - CONTROL: tokens with known names, NORMAL ones that look like them, and those that metadata
      names, except words of ordinary text: a file may name `!` for padding.
    - BYTE: the names of bytes in a vocabulary with byte fallback.
    """
    control = {ids[name] for name in control_tokens.CONTROL_NAMES if name in ids}
    control |= {i for name, i in ids.items() if types[i] == NORMAL and name not in BYTE_NAMES}
    named = metadata.roles(len(tokens)).values()
    control |= {i for i in named if types[i] != NORMAL or not _is_word(metadata, tokens[i], tokens)}
    for i in control:
        if types[i] != BYTE and not _PADDING_NAME.fullmatch(tokens[i]):
            types[i] = CONTROL
    if _kind(metadata) != "gpt2":
        for name in BYTE_NAMES:
            if name in ids:
                types[ids[name]] = BYTE
    if "</s>" in ids and "<|tool_response>" in ids:  # a tag of HTML in Gemma 4, as in `end_ids`
        types[ids["</s>"]] = NORMAL


def _is_word(metadata: TokenizerMetadata, token: str, tokens: list[str]) -> bool:
    """Whether ordinary text may be encoded to this token: a character, or two merged tokens."""
    pairs = [(token[:n], token[n:]) for n in range(1, len(token))]
    if not pairs or _kind(metadata) == "llama":
        return not pairs or any(left in tokens and right in tokens for left, right in pairs)
    merges = metadata.strings("tokenizer.ggml.merges")
    return any(f"{left} {right}" in merges for left, right in pairs)


def _is_padding(token: str, kind: int) -> bool:
    return kind == UNUSED or not token or (kind != NORMAL and _PADDING_NAME.fullmatch(token) is not None)


def _special(tokens: list[str], types: list[int], marked: list[int]) -> dict[str, int]:
    special = {tokens[i]: i for i in marked if types[i] in (CONTROL, USER_DEFINED)}
    longest = max(special, key=len, default="")
    if len(longest) > _MAX_NAME:
        what = f"the special token {special[longest]} has {len(longest)} characters"
        raise ModelLoadFailed(what, "tokenizer.ggml.tokens", f"{_MAX_NAME} at most")
    return special


def _add_bos(metadata: TokenizerMetadata, bos_id: int | None, default: bool) -> bool:
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", bool, default)
    if add_bos and bos_id is None:
        raise ModelLoadFailed("there is no BOS token to add", "tokenizer.ggml.bos_token_id", "a row of the vocabulary")
    return add_bos


def _strip_after_ids(metadata: TokenizerMetadata, special: dict[str, int]) -> frozenset[int]:
    # GGUF lacks this attribute of HF's Phi-3 tokenizers: detect it by name, as llama.cpp does.
    name = str(metadata.get("general.name", object, "")).lower()
    if "phi-3" not in name and "phi3" not in name:
        return frozenset()
    return frozenset(i for token, i in special.items() if token not in _PHI3_NOT_STRIPPING)
