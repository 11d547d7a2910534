"""Special tokens in text: `split` matches those that a template or raw prompt contains, `guard`
escapes user text.

Both are called by tokenizer.py: `guard` on the messages before the chat template, `split` on the
rendered prompt.
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
        # Lookup by the first two characters: a regex of all names would try a thousand alternatives
        # at each "<|".
        self._lengths = {head: sorted(found, reverse=True) for head, found in lengths.items()}
        self._head = re.compile("|".join(map(re.escape, self._lengths)) or "(?!)")
        self._names, self._reversed = sorted(ids), sorted(name[::-1] for name in ids)
        self._longest = max(map(len, ids), default=0)

    def split(self, text: str) -> Iterator[str | int]:
        """Yield ids of special tokens and the non-empty text between them.

        The longest name wins at each position.
        """
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
        """Return `text` with `mark` inserted so that `split` matches no special token in it,
        whatever surrounds it.

        Marks are inserted inside every name, at an end of the text where a name could begin or end,
        and after a text that could be the middle of a name, unless it is only white space. White
        space at the ends is ignored when looking for names, because templates trim it. Text without
        such places is returned unchanged.
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
        """Yield the positions where a name begins, including those inside another name."""
        at = 0
        while head := self._head.search(text, at):
            if self._name_at(text, head.start()) is not None:
                yield head.start()
            at = head.start() + 1

    @staticmethod
    def _begins(names: list[str], text: str) -> bool:
        """Whether a suffix of the text is a prefix of one of the sorted names."""
        for n in range(1, len(text) + 1):
            at = bisect_left(names, text[-n:])
            if at < len(names) and names[at].startswith(text[-n:]):
                return True
        return False
