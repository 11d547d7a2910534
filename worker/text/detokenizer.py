"""Token ids of an answer to published text: harmony headers, UTF-8 decoding, stop strings.

The output depends only on the ids pushed so far: a second worker that pushes the same ids publishes
the same text. `StopMatcher` withholds text that may still become a stop string; `HarmonyParser`
finds the headers and channels of gpt-oss's messages.
"""

import codecs
from collections.abc import Callable, Sequence
from typing import NamedTuple

from worker.text.tokenizer import Tokenizer
from worker.text.vocabulary import Vocabulary

_HARMONY_HEADER = ("<|start|>", "<|channel|>", "<|message|>")


class DetokenizedToken(NamedTuple):
    """The text that one token released."""

    text: str
    """Whole code points; empty for control tokens, headers and withheld text."""
    channel: str | None
    """analysis, commentary or final in the content of harmony messages."""
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
        self._harmony: HarmonyParser | None = None
        if HarmonyParser.supported_by(tokenizer.vocab):
            self._harmony = HarmonyParser(tokenizer.vocab.special, tokenizer.token_bytes)
            self._harmony.follow(prompt_ids)

    def push(self, token_id: int, *, last: bool = False) -> DetokenizedToken:
        """Add the answer's next token; `last` also releases withheld text.

        No text is released after a stop string.
        """
        channel, in_header, flush = None, False, last
        if self._harmony is not None:
            channel = self._harmony.channel
            flush = last or token_id in self._harmony.boundaries
            in_header = self._harmony.advance(token_id)
        text = self._decode(b"" if in_header else self._token_bytes(token_id), last)
        if self._matcher is None or self._unmatched > 0:
            self._unmatched -= 1
            return DetokenizedToken(text, channel, None)
        text = self._matcher.push(text)
        if flush:
            text += self._matcher.flush()
        return DetokenizedToken(text, channel, self._matcher.matched)


class StopMatcher:
    """Release text up to a stop string; withhold text that may become one with later tokens.

    A stop string matches as soon as it is complete. Of several that one token completes, the one
    that starts first wins, as in llama-server, and of those the longest. After a match, `matched`
    is that string and no more text is released.
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
            # Withhold the longest suffix that is a prefix of a stop string.
            lengths = range(min(self._longest_prefix, len(text)), 0, -1)
            start -= next((n for n in lengths if text[-n:] in self._prefixes), 0)
        self._withheld = text[start:] if self.matched is None else ""
        return text[:start]

    def flush(self) -> str:
        """Return the withheld text; call it where no stop string can continue."""
        withheld, self._withheld = self._withheld, ""
        return withheld


class HarmonyParser:
    """Track harmony, gpt-oss's message format: header tokens, and the channel of the content.

    A message is `<|start|>role<|channel|>name …<|message|>content<|end|>` (OpenAI's harmony guide).
    The state follows token ids; text is decoded only for a channel's name.
    """

    def __init__(self, special: dict[str, int], token_bytes: Callable[[int], bytes]) -> None:
        self.channel: str | None = None
        """The channel of the content at the next token; None in headers and outside channels."""
        self._token_bytes = token_bytes
        self._start, self._channel, self._message = (special[name] for name in _HARMONY_HEADER)
        self._ends = frozenset(special[name] for name in ("<|end|>", "<|return|>", "<|call|>") if name in special)
        self.boundaries = self._ends | {self._start, self._channel}
        """The tokens that end a message's content."""
        self._in_header = False
        self._name: bytes | None = None

    @staticmethod
    def supported_by(vocab: Vocabulary) -> bool:
        """Whether the vocabulary has the tokens of a harmony header."""
        return all(name in vocab.special for name in _HARMONY_HEADER)

    def follow(self, prompt_ids: Sequence[int]) -> None:
        """Advance through a prompt, from its last `<|start|>` on: earlier tokens have no effect."""
        ids = list(prompt_ids)
        first = len(ids) - 1 - ids[::-1].index(self._start) if self._start in ids else 0
        for token_id in ids[first:]:
            self.advance(token_id)

    def advance(self, token_id: int) -> bool:
        """Advance by one token; return whether it belongs to a header."""
        if token_id in self.boundaries:
            self._in_header = token_id not in self._ends
            self._name = b"" if token_id == self._channel else None
            self.channel = None
            return self._in_header
        if not self._in_header:
            return False
        if token_id == self._message:
            self._in_header = False
            words = (self._name or b"").decode(errors="replace").split()
            self.channel = words[0] if words and words[0] in ("analysis", "commentary", "final") else None
        elif self._name is not None:
            self._name += self._token_bytes(token_id)
        return True
