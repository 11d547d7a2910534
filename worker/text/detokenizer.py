"""Token ids of an answer to published text, token by token: incremental UTF-8 decoding, then stop
strings.

The output depends only on the ids pushed so far: a second worker that pushes the same ids publishes
the same text. `StopMatcher` withholds text that may still become a stop string. Read next:
channels.py.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from worker.text.channels import Channels
from worker.text.tokenizer import Tokenizer


class DetokenizedToken(NamedTuple):
    """The text that one token released."""

    text: str
    """Whole code points.

    Empty for control tokens and headers, and while a stop string may still form.
    """
    channel: str | None
    """analysis, commentary or final, for the content of gpt-oss's messages."""
    stop: str | None
    """The stop string that this token completed: the answer ends here."""


class IncrementalDetokenizer:
    """Decode the tokens of one answer.

    The concatenated texts equal `all_bytes.decode("utf-8", "replace")`, cut before the stop string.
    The first `min_tokens` tokens are neither matched against `stop` nor withheld. `prompt_ids`
    determine the harmony state in which the answer begins. A stop string never matches across two
    harmony messages.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, stop: Sequence[str] = (), min_tokens: int = 0, prompt_ids: Sequence[int] = ()
    ) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._matcher = StopMatcher(stop) if stop else None
        self._unmatched = min_tokens
        self._channels: Channels | None = None
        if Channels.supported_by(tokenizer.vocab):
            self._channels = Channels(tokenizer.vocab.special, tokenizer.token_bytes)
            self._channels.follow(prompt_ids)

    def push(self, token_id: int, *, last: bool = False) -> DetokenizedToken:
        """Add the answer's next token; `last` also releases withheld text.

        After a stop string no text is released.
        """
        channel, hidden, flush = None, False, last
        if self._channels is not None:
            channel = self._channels.channel
            flush = last or token_id in self._channels.boundaries
            hidden = self._channels.advance(token_id)
        text = self._decode(b"" if hidden else self._token_bytes(token_id), last)
        if self._matcher is None:
            return DetokenizedToken(text, channel, None)
        if self._unmatched > 0:
            self._unmatched -= 1
            return DetokenizedToken(text, channel, None)
        text = self._matcher.push(text)
        if flush:
            text += self._matcher.flush()
        return DetokenizedToken(text, channel, self._matcher.matched)


class StopMatcher:
    """Release text up to a stop string, matched across token boundaries; withhold text that may
    become one.

    A match is made as soon as a stop string is complete. Of several that one token completes, the
    one that starts first wins, and of those the longest (llama-server also takes the first start).
    After a match, `matched` is that string and no more text is released.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.matched: str | None = None
        self._stops = sorted(stops, key=len, reverse=True)
        self._prefixes = frozenset(stop[:n] for stop in stops for n in range(1, len(stop)))
        self._longest_prefix = max(map(len, self._prefixes), default=0)
        self._withheld = ""

    def push(self, text: str) -> str:
        """Append text; return the text that can no longer be part of a stop string."""
        if not text or self.matched is not None:
            return ""
        text = self._withheld + text
        start = len(text)
        for stop in self._stops:
            at = text.find(stop)
            if 0 <= at < start:
                start, self.matched = at, stop
        if self.matched is None:
            start -= self._partial_match(text)
        self._withheld = text[start:] if self.matched is None else ""
        return text[:start]

    def flush(self) -> str:
        """Return the withheld text; call it where no stop string can continue."""
        withheld, self._withheld = self._withheld, ""
        return withheld

    def _partial_match(self, text: str) -> int:
        """Return the length of the longest suffix of the text that is a prefix of a stop string."""
        for n in range(min(self._longest_prefix, len(text)), 0, -1):
            if text[-n:] in self._prefixes:
                return n
        return 0
