"""Special tokens in text: `split` finds them, `guard` escapes text that must not contain any.

tokenizer.py calls `guard` on the content of messages before the chat template is rendered, and
`split` on the rendered text and on raw prompts.
"""

import re
import sys
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import pairwise


class SpecialTokens:
    """The CONTROL and USER_DEFINED tokens of a vocabulary, by name.

    `user_defined` names those that are found in any text. The others, CONTROL tokens, are found in
    trusted text only.
    """

    def __init__(self, ids: Mapping[str, int], user_defined: Collection[str] = ()) -> None:
        self._ids = ids
        self._all = _Names(ids)
        self._control = _Names(name for name in ids if name not in user_defined)
        self._user_defined = _Names(user_defined)
        self._names, self._reversed = sorted(ids), sorted(name[::-1] for name in ids)
        self._longest = max(map(len, ids), default=0)

    def split(self, text: str, *, control: bool = True) -> Iterator[str | int]:
        """Yield special tokens' ids, the longest at each position, and the text between them.

        Without `control`, the names of CONTROL tokens are found first and stay text, so that no
        USER_DEFINED token is found that overlaps one.
        """
        found = self._all.find(text) if control else self._user_defined_in(text)
        start = 0
        for at, end in found:
            if start < at:
                yield text[start:at]
            yield self._ids[text[at:end]]
            start = end
        if start < len(text):
            yield text[start:]

    def _user_defined_in(self, text: str) -> Iterator[tuple[int, int]]:
        start = 0
        for at, end in self._control.find(text):
            yield from self._user_defined.find(text, start, at)
            start = end
        yield from self._user_defined.find(text, start)

    def guard(self, text: str, mark: str) -> str:
        """Insert `mark` so that `split` finds no special token that reaches into `text`.

        This holds for any text before and after it. A mark is inserted

        - inside each name,
        - at an end of the text, if it could complete or begin a name,
        - after the text, if it could be the middle of a name and is not only white space.

        Templates may trim white space, so the ends are also those of the trimmed text.
        """
        places = {at + 1 for at, _ in self._all.find(text, overlapping=True)}
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

    @staticmethod
    def _begins(names: list[str], text: str) -> bool:
        """Whether a suffix of the text is a prefix of one of the sorted names."""
        for n in range(1, len(text) + 1):
            at = bisect_left(names, text[-n:])
            if at < len(names) and names[at].startswith(text[-n:]):
                return True
        return False


class _Names:
    """A set of names to find in texts."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        lengths: defaultdict[str, set[int]] = defaultdict(set)
        seconds: defaultdict[str, set[str]] = defaultdict(set)
        for name in self._names:
            lengths[name[:2]].add(len(name))
            seconds[name[0]].add(name[1:2])
        for head in lengths:
            if head[0] in self._names:
                lengths[head].add(1)
        self._lengths = {head: tuple(sorted(found, reverse=True)) for head, found in lengths.items()}
        # By two characters: a regex of all names would try up to 1,000 alternatives at each "<|".
        heads = (re.escape(first) + _one_of(seconds[first]) for first in sorted(seconds))
        self._head = re.compile("|".join(heads) or "(?!)")

    def find(
        self, text: str, start: int = 0, stop: int = sys.maxsize, *, overlapping: bool = False
    ) -> Iterator[tuple[int, int]]:
        """Yield start and end of the longest name at each position of `text[start:stop]`.

        The search goes on after the name, with `overlapping` inside it.
        """
        stop = min(stop, len(text))
        while head := self._head.search(text, start, stop):
            at = head.start()
            end = self._end(text, at, stop)
            if end is not None:
                yield at, end
            start = at + 1 if end is None or overlapping else end

    def _end(self, text: str, at: int, stop: int) -> int | None:
        for length in self._lengths.get(text[at : at + 2]) or self._lengths.get(text[at], ()):
            if at + length <= stop and text[at : at + length] in self._names:
                return at + length
        return None


def _one_of(characters: set[str]) -> str:
    """Return a pattern of one of the characters, or of none if the empty string is among them."""
    return "" if "" in characters else f"[{''.join(map(re.escape, sorted(characters)))}]"
