"""Byte-level BPE (GPT-2, Radford et al. 2019) by HF's `tokenizers`: text → words → bytes → merged
pairs.

The byte alphabet maps each byte to one printable character, so that a token is a string. Special
tokens are split off before (special_tokens.py). Read next: pre_tokenizers.py, which splits text
into words.
"""

from __future__ import annotations

from itertools import compress, repeat

from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from worker.errors import ModelLoadFailed
from worker.text.pre_tokenizers import pre_tokenizer
from worker.text.vocabulary import Vocabulary


class ByteBpe:
    """Encoder of ordinary text for vocabularies of kind `gpt2`."""

    def __init__(self, vocab: Vocabulary, merges: list[str]) -> None:
        ids = vocab.ordinary()
        # A truncated vocabulary keeps the merges of the full one: drop those whose result it lacks.
        inside = map(ids.__contains__, map(str.replace, merges, repeat(" "), repeat(""), repeat(1)))
        split = map(str.partition, compress(merges, inside), repeat(" "))
        pairs = [(left, right) for left, _, right in split]
        # A byte that the vocabulary lacks separates its neighbours before it is dropped, so it
        # needs a temporary id.
        alphabet = byte_alphabet()
        self._missing = {char: vocab.size + n for n, char in enumerate(alphabet) if char not in ids}
        ids |= self._missing
        self._size = vocab.size
        words = pre_tokenizer(vocab.pre)
        try:
            self._bpe = Tokenizer(BPE(vocab=ids, merges=pairs, ignore_merges=words.ignore_merges))
        except Exception as error:  # `tokenizers` raises bare Exceptions
            what = f"the merges don't fit the vocabulary ({str(error)[:120]})"
            raise ModelLoadFailed(what, "tokenizer.ggml.merges", "pairs of tokens, a space between") from error
        splits = [Split(Regex(pattern), "isolated") for pattern in words.patterns]
        self._bpe.pre_tokenizer = Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])
        self._bytes = {char: bytes([byte]) for byte, char in enumerate(alphabet)}

    def encode(self, text: str) -> list[int]:
        """Return the ids of ordinary text; bytes that the vocabulary lacks are dropped."""
        # Unlike `encode`, a batch of one releases the GIL: a prompt of megabytes does not block the
        # event loop.
        ids: list[int] = self._bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids
        if self._missing:
            return [token_id for token_id in ids if token_id < self._size]
        return ids

    def decode_token(self, token: str) -> bytes:
        """Return the bytes of a NORMAL token.

        A character outside the byte alphabet is encoded as UTF-8.
        """
        return b"".join(self._bytes.get(char) or char.encode() for char in token)


def byte_alphabet() -> list[str]:
    """Return GPT-2's 256 characters, one per byte.

    The Latin-1 character if printable, else one from U+0100.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
