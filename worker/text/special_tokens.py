"""Special tokens in text: found whole where a template or a raw prompt writes them, kept apart from a user's words.

Knows names and ids only. Read next: chat_template.py, which asks for users' words to be guarded, and tokenizer.py,
which splits.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import pairwise


class SpecialTokens:
    """The special tokens of a vocabulary, by name; each name has two characters or more."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = ids
        lengths = defaultdict(set)
        for name in ids:
            lengths[name[:2]].add(len(name))
        # Name by name a regex would try a thousand alternatives at every "<|"; by head there are a few lengths to try.
        self._lengths = {head: sorted(found, reverse=True) for head, found in lengths.items()}
        self._head = re.compile("|".join(map(re.escape, self._lengths)) or "(?!)")
        self._names, self._reversed = sorted(ids), sorted(name[::-1] for name in ids)
        self._longest = max(map(len, ids), default=0)

    def split(self, text: str) -> Iterator[str | int]:
        """Yield the ids of special tokens and, never empty, the text between; at each place the longest name wins."""
        start = at = 0
        while head := self._head.search(text, at):
            at = head.start()
            name = self._name_at(text, at)
            if name is None:
                at += 1
                continue
            if start < at:
                yield text[start:at]
            yield self._ids[name]
            start = at = at + len(name)
        if start < len(text):
            yield text[start:]

    def guard(self, text: str, mark: str) -> str:
        """Return `text` with `mark` put in so that no special token can be found in it, whatever stands around it.

        Inside every name, at an end of the text that a name could begin or end in, and after a text, unless it is white
        space alone, that could be the middle of one. White space at the ends is looked past, because templates trim it.
        Text without any of that comes back unchanged.
        """
        places = {at + 1 for at in self._starts(text)}
        for end in {len(text), len(text.rstrip())}:
            if self._begins(self._names, text[max(0, end - self._longest) : end]):
                places.add(end)
        for start in {0, len(text) - len(text.lstrip())}:
            if self._begins(self._reversed, text[start : start + self._longest][::-1]):
                places.add(start)
        core = text.strip()
        if 0 < len(core) < self._longest and any(core in name for name in self._ids):
            places.add(len(text.rstrip()))
        return mark.join(text[a:b] for a, b in pairwise([0, *sorted(places), len(text)]))

    def _name_at(self, text: str, at: int) -> str | None:
        for length in self._lengths[text[at : at + 2]]:
            if text[at : at + length] in self._ids:
                return text[at : at + length]
        return None

    def _starts(self, text: str) -> Iterator[int]:
        """Where a name begins, those inside another name too."""
        at = 0
        while head := self._head.search(text, at):
            if self._name_at(text, head.start()) is not None:
                yield head.start()
            at = head.start() + 1

    @staticmethod
    def _begins(names: list[str], text: str) -> bool:
        """Whether some end of the text is the beginning of one of the sorted names."""
        for n in range(1, len(text) + 1):
            at = bisect_left(names, text[-n:])
            if at < len(names) and names[at].startswith(text[-n:]):
                return True
        return False
