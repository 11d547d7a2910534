"""Special tokens in text: `split` finds them, `guard` escapes text that must not contain any.

tokenizer.py calls `guard` on the content of messages before the chat template is rendered, and
`split` on the rendered text and on raw prompts.
"""

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
        # By two characters: a regex of all names would try up to 1,000 alternatives at each "<|".
        self._lengths = {head: sorted(found, reverse=True) for head, found in lengths.items()}
        self._head = re.compile("|".join(map(re.escape, self._lengths)) or "(?!)")
        self._names, self._reversed = sorted(ids), sorted(name[::-1] for name in ids)
        self._longest = max(map(len, ids), default=0)

    def split(self, text: str) -> Iterator[str | int]:
        """Yield special tokens' ids, the longest at each position, and the text between them."""
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
        """Insert `mark` so that `split` finds no special token that reaches into `text`.

        This holds for any text before and after it. A mark is inserted

        - inside each name,
        - at an end of the text, if it could complete or begin a name,
        - after the text, if it could be the middle of a name and is not only white space.

        Templates may trim white space, so the ends are also those of the trimmed text.
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
        """Yield the position of each name, including names inside another one."""
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
