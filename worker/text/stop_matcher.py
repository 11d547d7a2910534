"""Stop strings, matched on text across the edges of tokens; what may still become one is held back.

A match is made as soon as some stop string is whole. Of several that one token makes whole, the one that starts first
wins, and of those the longest (llama-server takes the first start too). Knows nothing of tokens. Read next:
text_stream.py.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Releases pushed text up to a stop string; after a match, `matched` is that string and nothing more comes."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.matched: str | None = None
        self._stops = sorted(stops, key=len, reverse=True)
        self._beginnings = frozenset(stop[:n] for stop in stops for n in range(1, len(stop)))
        self._longest = max(map(len, self._beginnings), default=0)
        self._held = ""

    def push(self, text: str) -> str:
        """Return the text that is now certain to belong to the answer."""
        if not text or self.matched is not None:
            return ""
        text = self._held + text
        start = len(text)
        for stop in self._stops:
            at = text.find(stop)
            if 0 <= at < start:
                start, self.matched = at, stop
        if self.matched is not None:
            self._held = ""
            return text[:start]
        held = self._may_begin(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Return what is held: no stop string can come of it any more."""
        held, self._held = self._held, ""
        return held

    def _may_begin(self, text: str) -> int:
        """Return the length of the longest end of the text that a stop string begins with."""
        for n in range(min(self._longest, len(text)), 0, -1):
            if text[-n:] in self._beginnings:
                return n
        return 0
