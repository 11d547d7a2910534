"""Token ids of an answer to published text: UTF-8 decoding, channels, stop strings.

The output depends only on the ids pushed so far: a second worker that pushes the same ids publishes
the same text. `StopMatcher` withholds text that may still become a stop string; `parsers/` assigns
the text to channels.
"""

import codecs
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from worker.text.parsers.interface import Parser, Piece, Place
from worker.text.tokenizer import Tokenizer

_FINAL = Place("final")


class DetokenizedToken(NamedTuple):
    """The text that one token released."""

    text: str
    """Whole code points; empty for control tokens, markup and withheld text."""
    place: Place
    """The channel of the text and, for a tool call, its recipient and index."""
    stop: str | None
    """The stop string that this token completed: the answer ends here."""


class IncrementalDetokenizer:
    """Decode the tokens of one answer.

    Without a parser, the concatenated texts equal `all_bytes.decode("utf-8", "replace")`, cut
    before the stop string; a parser removes the markup from it. The first `min_tokens` tokens are
    neither matched against `stop` nor withheld for it. Tokens of `silent_ids` have no text.

    Stop strings are matched on the text of each channel as it is published, never across markup; a
    stop string that contains a mark of the parser, such as `</think>`, on the text with the markup.

    A token has one channel. If it completes text of several channels, the later text is published
    with the next tokens; the last token publishes all that is left, on the channel final if text of
    it is left, else on the first one's.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        parser: Parser | None = None,
        silent_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._token_bytes = _without(silent_ids, tokenizer.token_bytes)
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._unmatched = min_tokens
        self._parsed: _ParsedText | None = None
        if parser is not None:
            special = tokenizer.vocab.special
            self._markup = {special[mark]: mark.encode() for mark in parser.marks if mark in special}
            self._markup |= dict.fromkeys(parser.boundaries | silent_ids, b"")
            self._boundaries = parser.boundaries
            self._parsed = _ParsedText(parser, [text for text in stop if not _has_mark(text, parser)])
            stop = [text for text in stop if _has_mark(text, parser)]
        self._matcher = StopMatcher(stop) if stop else None
        self.is_plain = self._parsed is None and self._matcher is None
        """Whether the text is only decoded: `decode` may be called instead of `push`."""

    def decode(self, token_id: int, *, last: bool = False) -> str:
        """The text of the next token of an answer without stop strings and markup."""
        return self._decode(self._token_bytes(token_id), last)

    def push(self, token_id: int, *, last: bool = False) -> DetokenizedToken:
        """Add the answer's next token; `last` also releases withheld text.

        No text is released after a stop string.
        """
        matching = self._unmatched <= 0
        self._unmatched -= 1
        if self._parsed is not None:
            return self._push_parsed(self._parsed, token_id, last, matching)
        text = self._decode(self._token_bytes(token_id), last)
        if self._matcher is None or not matching:
            return DetokenizedToken(text, _FINAL, None)
        text = self._matcher.push(text)
        if last:
            text += self._matcher.flush()
        return DetokenizedToken(text, _FINAL, self._matcher.matched)

    def _push_parsed(self, parsed: "_ParsedText", token_id: int, last: bool, matching: bool) -> DetokenizedToken:
        data = self._markup[token_id] if token_id in self._markup else self._token_bytes(token_id)
        text = self._decode(data, last or token_id in self._boundaries)
        stop = None
        if self._matcher is not None and matching:
            text = self._matcher.push(text)
            if last:
                text += self._matcher.flush()
            stop = self._matcher.matched
        ends = last or stop is not None
        parsed.push(token_id, text, matching=matching, last=ends)
        ends = ends or parsed.stop is not None
        text, place = parsed.take(everything=ends)
        return DetokenizedToken(text, place, parsed.stop or stop)


class _ParsedText:
    """The text of an answer on its way through a parser and the stop strings of each channel."""

    def __init__(self, parser: Parser, stop: Sequence[str]) -> None:
        self._parser = parser
        self._matcher = StopMatcher(stop) if stop else None
        self._matched_place = parser.place
        self._ready: list[Piece] = []
        """Published with the next tokens; neighbours differ in their places."""

    @property
    def stop(self) -> str | None:
        """The stop string that ended the answer."""
        return self._matcher.matched if self._matcher else None

    def push(self, token_id: int, text: str, *, matching: bool, last: bool) -> None:
        """Add text; if not `matching`, no stop string ends it. `last` releases withheld text."""
        self._add(self._parser.push(token_id, text), matching)
        if last and self.stop is None:
            self._add(self._parser.flush(), matching)
        if self._matcher is not None and (last or self._parser.place is not self._matched_place):
            self._leave(self._matcher, self._parser.place)

    def take(self, *, everything: bool) -> tuple[str, Place]:
        """Return the next text to publish, of one channel, and its place."""
        if not self._ready:
            return "", self._parser.place
        if not everything or len(self._ready) == 1:
            place, text = self._ready.pop(0)
            return text, place
        ready, self._ready = self._ready, []
        place = next((place for place, _ in ready if place.channel == "final"), ready[0][0])
        return "".join(text for _, text in ready), place

    def _add(self, pieces: Iterable[Piece], matching: bool) -> None:
        for place, piece in pieces:
            text = piece
            if self._matcher is not None and matching:
                if place is not self._matched_place:
                    self._leave(self._matcher, place)
                text = self._matcher.push(piece)
            self._publish(place, text)

    def _leave(self, matcher: "StopMatcher", place: Place) -> None:
        """Publish withheld text: no stop string continues in text of another place."""
        self._publish(self._matched_place, matcher.flush())
        self._matched_place = place

    def _publish(self, place: Place, text: str) -> None:
        if text and self._ready and self._ready[-1][0] == place:
            self._ready[-1] = (place, self._ready[-1][1] + text)
        elif text:
            self._ready.append((place, text))


def _has_mark(stop: str, parser: Parser) -> bool:
    return any(mark in stop for mark in parser.marks)


def _without(silent_ids: frozenset[int], token_bytes: Callable[[int], bytes]) -> Callable[[int], bytes]:
    return (lambda token_id: b"" if token_id in silent_ids else token_bytes(token_id)) if silent_ids else token_bytes


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
