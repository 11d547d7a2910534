"""Byte-level BPE (GPT-2, Radford et al. 2019): text → words → bytes → merged pairs, by HF's `tokenizers`.

Each byte is written as one printable character, the byte alphabet, so that a token is a string. Knows nothing of
special tokens. Read next: pre_tokenizers.py, which cuts the words.
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
    """Ordinary text to ids and back, for vocabularies of kind `gpt2`."""

    def __init__(self, vocab: Vocabulary, merges: list[str]) -> None:
        ids = vocab.ordinary()
        # A vocabulary that was cut keeps the merges of the whole one: those that lead out of it are none of its own.
        inside = map(ids.__contains__, map(str.replace, merges, repeat(" "), repeat(""), repeat(1)))
        split = map(str.partition, compress(merges, inside), repeat(" "))
        pairs = [(left, right) for left, _, right in split]
        # A byte that the vocabulary lacks parts its neighbours before it is left out, so it needs an id for a while.
        alphabet = byte_alphabet()
        self._lacking = {char: vocab.size + n for n, char in enumerate(alphabet) if char not in ids}
        ids |= self._lacking
        self._size = vocab.size
        words = pre_tokenizer(vocab.pre)
        try:
            self._bpe = Tokenizer(BPE(vocab=ids, merges=pairs, ignore_merges=words.ignore_merges))
        except Exception as error:  # `tokenizers` raises bare Exceptions for merges that don't fit the vocabulary
            what = f"the merges don't fit the vocabulary ({str(error)[:120]})"
            raise ModelLoadFailed(what, "tokenizer.ggml.merges", "pairs of tokens, a space between") from error
        splits = [Split(Regex(pattern), "isolated") for pattern in words.patterns]
        self._bpe.pre_tokenizer = Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])
        self._bytes = {char: bytes([byte]) for byte, char in enumerate(alphabet)}

    def encode(self, text: str) -> list[int]:
        """Return the ids of ordinary text; a byte that the vocabulary lacks is left out."""
        # A batch of one: unlike `encode` it lets other threads run, so a prompt of megabytes holds up no event loop.
        ids: list[int] = self._bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids
        if self._lacking:
            return [token_id for token_id in ids if token_id < self._size]
        return ids

    def spell(self, token: str) -> bytes:
        """Return the bytes that a NORMAL token stands for; a character outside the byte alphabet stands for itself."""
        return b"".join(self._bytes.get(char) or char.encode() for char in token)


def byte_alphabet() -> list[str]:
    """Return GPT-2's 256 characters, one for each byte: its own Latin-1 one if that prints, else one from U+0100 on."""
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in prints else next(others)) for byte in range(256)]
