"""Log-probabilities of an answer's tokens, aligned with its text.

A job's tokens release their text late: the bytes of an emoji may be split among tokens, and text
that may become a stop string is withheld. An entry is released when the text has all bytes of its
token, so the entries' bytes, joined, are the text's. Tokens without text have no entry.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

from worker.jobs.events import Token

LOWEST = -9999.0
"""OpenAI's value for the log-probability of a token that cannot occur; JSON has no infinity."""


class Entry(NamedTuple):
    """One token of the text."""

    token: Token
    data: bytes
    """Its bytes in the text."""
    offset: int
    """Characters of the text before it; before the character that it continues."""

    @property
    def logprob(self) -> float:
        """Its log-probability."""
        return max(LOWEST, self.token.logprob or 0.0)


class AlignedTokens:
    """The tokens of one choice on their way from the job's events to entries."""

    def __init__(self) -> None:
        self._pending: deque[tuple[Token, bytes]] = deque()
        self._text = b""
        """Released text that no entry covers."""
        self._count_chars = codecs.getincrementaldecoder("utf-8")("ignore").decode
        self._offset = 0

    def push(self, token: Token) -> list[Entry]:
        """Add a token with the text that it released; return the entries that are complete."""
        data = token.t.encode() if token.data is None else token.data
        if data:
            self._pending.append((token, data))
        self._text += token.t.encode()
        return list(self._complete())

    def flush(self) -> list[Entry]:
        """The entries that are left at the end, cut where a stop string has cut the text."""
        entries = list(self._complete())
        while self._text and self._pending:
            token, data = self._pending.popleft()
            entries.append(self._entry(token, len(data) if self._pending else len(self._text)))
        self._pending.clear()
        return entries

    def _complete(self) -> Iterable[Entry]:
        while self._pending:
            token, data = self._pending[0]
            shown = _shown(data, self._text)
            if shown is not None and len(self._text) < len(shown):
                return
            self._pending.popleft()
            if shown:  # else markup, which is not part of the text
                yield self._entry(token, len(shown))

    def _entry(self, token: Token, size: int) -> Entry:
        """Cover the next `size` bytes of the text, or what is left of it."""
        data, self._text = self._text[:size], self._text[size:]
        offset = self._offset
        self._offset += len(self._count_chars(data))
        return Entry(token, data, offset)


def _shown(data: bytes, text: bytes) -> bytes | None:
    """The bytes of a token as the text that follows shows them; None if it does not show them.

    A vocabulary may add a space before the first word, and invalid UTF-8 is shown as U+FFFD.
    """
    for shown in (data, data.removeprefix(b" "), data.decode("utf-8", "replace").encode()):
        length = min(len(shown), len(text))
        if shown[:length] == text[:length]:
            return shown
    return None


def token_text(data: bytes) -> str:
    """A token's text; bytes that are no characters by themselves as OpenAI writes them: `\\xf0`."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in data)


def alternatives(token: Token) -> list[tuple[str, bytes | None, float]]:
    """Text, bytes and log-probability of the likeliest tokens; without bytes, the id as text."""
    data: Iterable[bytes | None] = token.top_data or [None] * len(token.top or ())
    return [
        (f"token_id:{id}" if each is None else token_text(each), each, max(LOWEST, logprob))
        for (id, logprob), each in zip(token.top or (), data, strict=True)
    ]


def chat_logprob(entry: Entry) -> dict[str, Any]:
    """An item of `logprobs.content` of a chat completion."""
    top = [
        {"token": text, "logprob": logprob, "bytes": None if data is None else list(data)}
        for text, data, logprob in alternatives(entry.token)
    ]
    own = {"token": token_text(entry.data), "logprob": entry.logprob, "bytes": list(entry.data)}
    return own | {"top_logprobs": top}
