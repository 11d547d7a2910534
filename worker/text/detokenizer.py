"""Bytes of tokens to text, as they come: whole code points only, U+FFFD for what is no UTF-8.

Knows nothing of tokens. Read next: text_stream.py.
"""

from __future__ import annotations

import codecs


class Detokenizer:
    """An incremental UTF-8 decoder: all that it returns, joined, is `all_bytes.decode("utf-8", "replace")`."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, data: bytes, *, last: bool = False) -> str:
        """Return the text that these bytes complete; the last ones also that of a sequence left unfinished."""
        return self._decode(data, last)
