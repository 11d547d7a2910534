"""The vocabulary in the form that llguidance needs: the bytes of each token, and the end tokens.

A mask is a function of bytes alone: the grammars forbid llguidance to tokenize forced text, so the
encoder is only there to satisfy its interface. Read next: grammar.py.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from worker.text.tokenizer import Tokenizer
from worker.text.vocabulary import CONTROL

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_SPECIAL = b"\xff"
"""First byte of special tokens in llguidance: grammars refer to them by id, never as text."""
_MAX_BYTES = 255
"""The longest token of llguidance's trie; longer ones can't be drawn."""


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """Return each token's bytes as llguidance takes them; empty for those that are never allowed.

    These are the padding rows, the tokens that the file suppresses, and those without text. No
    UTF-8 text contains the byte 0xFF, so no other token of that beginning is needed.
    """
    vocab = tokenizer.vocab
    never = vocab.padding_ids | vocab.suppressed_ids
    texts = []
    for token_id, (name, kind) in enumerate(zip(vocab.tokens, vocab.types, strict=True)):
        if token_id in vocab.end_ids or (kind == CONTROL and token_id not in never):
            texts.append(_SPECIAL + name.encode())
            continue
        text = b"" if token_id in never else tokenizer.token_bytes(token_id)
        texts.append(b"" if text.startswith(_SPECIAL) or len(text) > _MAX_BYTES else text)
    return texts


def library_tokenizer(tokenizer: Tokenizer) -> "LLTokenizer":
    """Build llguidance's token trie. 0.5 s for 150,000 tokens, during which it keeps the GIL.

    The vocabulary must have an end token.
    """
    from llguidance import LLTokenizer  # noqa: PLC0415  # only jobs with a grammar need it

    return LLTokenizer(_Wrapper(tokenizer), eos_token=sorted(tokenizer.vocab.end_ids))  # type: ignore[arg-type]


class _Wrapper:
    """What llguidance reads of a tokenizer, by these names."""

    is_tokenizer_wrapper = True
    bos_token_id: int | None = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokens = token_bytes(tokenizer)
        self.eos_token_id = min(tokenizer.vocab.end_ids)
        self._encode = tokenizer.word_encoder  # not the tokenizer, which holds the trie

    def __call__(self, text: str) -> list[int]:
        """Encode ordinary text without a space prefix: llguidance panics if there is one."""
        return self._encode(text)
