"""Special tokens in text: `split` finds them in prompts, `split_traced` in rendered templates."""

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from worker.text.traced_text import UNKNOWN, UNTRUSTED, TracedText

_NOT_UNTRUSTED = re.compile(b"[^%c]+" % UNTRUSTED)


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
        if not self._user_defined:
            return
        start = 0
        for at, end in self._control.find(text):
            yield from self._user_defined.find(text, start, at)
            start = end
        yield from self._user_defined.find(text, start)

    def split_traced(self, text: TracedText, requested: Callable[[], Iterable[str]]) -> Iterator[str | int]:
        """Split a rendered template: a CONTROL token counts only if the template wrote all of it.

        One with characters of unknown origin counts unless it could come from one of the texts
        that `requested` returns, which is only called if there is one.
        """
        plain, origin = str.__str__(text), text._origin
        start = 0
        for run in _NOT_UNTRUSTED.finditer(origin):
            for at, end in self._all.find(plain, run.start(), run.end()):
                if UNKNOWN in origin[at:end] and _could_form(plain[at:end], requested()):
                    continue
                yield from self.split(plain[start:at], control=False)
                yield self._ids[plain[at:end]]
                start = end
        yield from self.split(plain[start:], control=False)


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

    def __bool__(self) -> bool:
        return bool(self._names)

    def find(self, text: str, start: int = 0, stop: int = sys.maxsize) -> Iterator[tuple[int, int]]:
        """Yield start and end of the longest name at each position of `text[start:stop]`."""
        stop = min(stop, len(text))
        while head := self._head.search(text, start, stop):
            at = head.start()
            end = self._end(text, at, stop)
            if end is not None:
                yield at, end
            start = at + 1 if end is None else end

    def _end(self, text: str, at: int, stop: int) -> int | None:
        for length in self._lengths.get(text[at : at + 2]) or self._lengths.get(text[at], ()):
            if at + length <= stop and text[at : at + length] in self._names:
                return at + length
        return None


def _one_of(characters: set[str]) -> str:
    """Return a pattern of one of the characters, or of none if the empty string is among them."""
    return "" if "" in characters else f"[{''.join(map(re.escape, sorted(characters)))}]"


def _could_form(name: str, texts: Iterable[str]) -> bool:
    """Whether a name could be made of one of the texts and what is around it in a template.

    The text may contain it, with other characters between, or be a part of it, or overlap an end.
    """
    name = name.casefold()
    for text in (text.strip().casefold() for text in texts):
        remaining = iter(text)
        if text and (text in name or all(char in remaining for char in name)):
            return True
        if any(text.endswith(name[:n]) or text.startswith(name[-n:]) for n in range(1, len(name))):
            return True
    return False
