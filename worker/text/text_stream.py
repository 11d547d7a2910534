"""The way out of the engine: token ids of an answer become the text that is published, token by token.

Everything here follows from the ids pushed so far, so a second worker that pushes the same ids publishes the same text.
Knows no clock and no job. Read next: detokenizer.py, channels.py, stop_matcher.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from worker.text.channels import Channels
from worker.text.detokenizer import Detokenizer
from worker.text.stop_matcher import StopMatcher
from worker.text.tokenizer import Tokenizer


class Piece(NamedTuple):
    """What one token released."""

    text: str
    """Whole code points; empty for control tokens and headers, and while a stop string may still form."""
    channel: str | None
    """analysis, commentary or final, for the content of gpt-oss's messages."""
    stop: str | None
    """The stop string that this token completed: the answer ends here."""


class TextStream:
    """One answer's text. Joined, the texts are the UTF-8 'replace' decoding of all released bytes, cut before a stop.

    The first `min_tokens` tokens are neither matched against `stop` nor held back. `prompt_ids` tell where in a harmony
    conversation the answer begins. A stop string never reaches from one harmony message into the next.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, stop: Sequence[str] = (), min_tokens: int = 0, prompt_ids: Sequence[int] = ()
    ) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._detokenizer = Detokenizer()
        self._matcher = StopMatcher(stop) if stop else None
        self._unmatched = min_tokens
        self._channels: Channels | None = None
        if Channels.known_to(tokenizer.vocab):
            self._channels = Channels(tokenizer.vocab.special, tokenizer.token_bytes)
            self._channels.follow(prompt_ids)

    def push(self, token_id: int, *, last: bool = False) -> Piece:
        """Take the answer's next token; `last` also releases what is held. After a stop nothing more is released."""
        channel, hidden, flush = None, False, last
        if self._channels is not None:
            channel = self._channels.channel
            flush = last or token_id in self._channels.edges
            hidden = self._channels.advance(token_id)
        text = self._detokenizer.push(b"" if hidden else self._token_bytes(token_id), last=last)
        if self._matcher is None:
            return Piece(text, channel, None)
        if self._unmatched > 0:
            self._unmatched -= 1
            return Piece(text, channel, None)
        text = self._matcher.push(text)
        if flush:
            text += self._matcher.flush()
        return Piece(text, channel, self._matcher.matched)
