"""`TracedText`: a `str` that records where each of its characters comes from.

A chat template is rendered with it, so that the special tokens that the template writes can be told
from those that a message contains. Read next: traced_template.py, which renders with it.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, SupportsIndex, cast

UNKNOWN, TRUSTED, UNTRUSTED = 0, 1, 2
"""Origins of a character: not recorded, the template or vocabulary, the request."""

Sources = frozenset[str]
NO_SOURCES: Sources = frozenset()

# Reserved by Unicode for internal use; a run of one of them stands for an argument of a format.
_FIRST_FILLER, _FILLERS = 0xFDD0, 32
_FILLED = re.compile(r"([\uFDD0-\uFDEF])\1*")


class TracedText(str):
    """A text with the origin of each character and the sources of the non-blank ones.

    `_origin` has one byte for each character: UNKNOWN, TRUSTED or UNTRUSTED. `_sources` names the
    fields of the request that text in it was derived from. Methods that are not overridden return
    an ordinary `str`; the template's environment labels it. The names have an underscore because
    templates can't read such attributes.
    """

    __slots__ = ("_origin", "_sources")
    _origin: bytes
    _sources: Sources

    def __new__(cls, text: str = "", origin: bytes | None = None, sources: Sources = NO_SOURCES) -> "TracedText":
        self = str.__new__(cls, text)
        self._origin = bytes(len(text)) if origin is None else origin
        self._sources = NO_SOURCES if sources and (not text or text.isspace()) else sources
        return self

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> str:
        return NotImplemented if hasattr(other, "__html__") else self._joined(str.__add__(self, other), [self, other])

    def __radd__(self, other: str) -> str:
        return self._joined(str.__add__(other, self), [other, self])

    def __mul__(self, count: SupportsIndex) -> str:
        return TracedText(str.__mul__(self, count), self._origin * count, self._sources)

    __rmul__ = __mul__

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        origin = self._origin[key if isinstance(key, slice) else slice(key, None)]
        text = str.__getitem__(self, key)
        return TracedText(text, origin[: len(text)], self._sources)

    def __iter__(self) -> Iterator[str]:
        for char, origin in zip(str.__iter__(self), self._origin, strict=True):
            yield TracedText(char, bytes([origin]), self._sources)

    def __mod__(self, value: Any) -> str:
        def call(args: list[Any], named: Mapping[str, Any]) -> str:
            return str.__mod__(self, tuple(args) if isinstance(value, tuple) else args[0] if args else named)

        if isinstance(value, Mapping):
            return trace_format(self, call, [], value)
        return trace_format(self, call, list(value) if isinstance(value, tuple) else [value], {})

    def strip(self, chars: str | None = None, /) -> str:
        return cast(TracedText, self.lstrip(chars)).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> str:
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None, /) -> str:
        return self[: len(str.rstrip(self, chars))]

    def removeprefix(self, prefix: str, /) -> str:
        return self[len(self) - len(str.removeprefix(self, prefix)) :]

    def removesuffix(self, suffix: str, /) -> str:
        return self[: len(str.removesuffix(self, suffix))]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._pieces(str.split(self, sep, maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._pieces(str.rsplit(self, sep, maxsplit), len(sep or ""))

    def splitlines(self, keepends: bool = False) -> list[str]:
        return self._pieces(str.splitlines(self, keepends))

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        return cast(tuple[str, str, str], tuple(self._pieces(str.partition(self, sep))))

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        return cast(tuple[str, str, str], tuple(self._pieces(str.rpartition(self, sep))))

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        if not old:
            return labelled(str.replace(self, old, new, count), (self, new))
        return trace(new).join(self.split(old, count))

    def join(self, items: Iterable[str], /) -> str:
        parts: list[str] = []
        for item in items:
            parts += [self, item]
        return self._joined(str.join(self, parts[1::2]), parts[1:])

    def lower(self) -> str:
        return self._recased(str.lower(self))

    def upper(self) -> str:
        return self._recased(str.upper(self))

    def title(self) -> str:
        return self._recased(str.title(self))

    def capitalize(self) -> str:
        return self._recased(str.capitalize(self))

    def _recased(self, text: str) -> str:
        return TracedText(text, self._origin, self._sources) if len(text) == len(self) else labelled(text, self)

    def _pieces(self, pieces: Iterable[str], gap: int = 0) -> list[str]:
        """The pieces as slices of this text, where they follow each other at a distance of `gap`.

        Without a gap, what lies between them are characters that no piece begins with.
        """
        traced, at = [], -gap
        for piece in pieces:
            at = at + gap if gap else self.find(piece, at)
            traced.append(self[at : at + len(piece)])
            at += len(piece)
        return traced

    @staticmethod
    def _joined(text: str, parts: Iterable[str]) -> str:
        traced = [trace(part) for part in parts]
        sources = NO_SOURCES.union(*[part._sources for part in traced])
        return TracedText(text, b"".join([part._origin for part in traced]), sources)


def trace(value: object, origin: int = UNKNOWN, sources: Sources = NO_SOURCES) -> TracedText:
    """The value as text; a value that is not traced yet has one origin, or that of its items."""
    if type(value) is TracedText:
        return value
    text = str(value)
    if type(text) is TracedText:
        return text
    if not isinstance(value, str):
        origin, sources = survey(value)
    return TracedText(text, bytes([origin]) * len(text), sources)


def trace_all(value: Any, origin: int, sources: Sources = NO_SOURCES) -> Any:
    """A copy of a JSON value, or a list or map of others, with each string traced, keys too."""
    if isinstance(value, str):
        return TracedText(value, bytes([origin]) * len(value), sources)
    if isinstance(value, Mapping):
        return {trace_all(key, origin): trace_all(item, origin, sources) for key, item in value.items()}
    return [trace_all(item, origin, sources) for item in value] if isinstance(value, list | tuple) else value


def untrace(value: Any) -> Any:
    """A copy of a value of lists and maps in which each string is an ordinary one."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, dict):
        return {untrace(key): untrace(item) for key, item in value.items()}
    return [untrace(item) for item in value] if isinstance(value, list) else value


def untrusted_texts(value: object) -> set[str]:
    """The texts of the request in a value, and its numbers as texts."""
    texts, stack = set(), [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            if survey(item)[0] != TRUSTED:
                texts.add(str.__str__(item))
        elif isinstance(item, Mapping):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            stack += item
        elif isinstance(item, int | float):
            texts.add(str(item))
    return texts


def concat(parts: Iterable[object]) -> str:
    """Join the texts of the values. It replaces jinja2's `concat`."""
    return TracedText("", b"").join([trace(part) for part in parts])


def labelled(text: str, inputs: object) -> str:
    """A text computed from `inputs`: each character has the least trusted origin in them."""
    origin, sources = survey(inputs)
    return TracedText(text, bytes([origin]) * len(text), sources)


def survey(value: object) -> tuple[int, Sources]:
    """The least trusted origin of the strings in a value, and all their sources."""
    origins: set[int] = set()
    sources: set[str] = set()
    stack = [value]
    while stack:
        item = stack.pop()
        if type(item) is TracedText:
            origins.update(origin for origin in (UNKNOWN, TRUSTED, UNTRUSTED) if origin in item._origin)
            sources.update(item._sources)
        elif isinstance(item, str):
            origins.add(UNKNOWN)
        elif isinstance(item, Mapping):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            stack += item
    if UNTRUSTED in origins:
        return UNTRUSTED, frozenset(sources)
    return (TRUSTED if origins == {TRUSTED} else UNKNOWN), frozenset(sources)


def trace_format(
    template: str,
    call: Callable[[list[Any], Mapping[str, Any]], str],
    args: list[Any],
    named: Mapping[str, Any],
) -> str:
    """Format a template and trace each character to the template or to one of the arguments.

    The call is repeated with arguments of the same length, each made of one character that occurs
    nowhere else. If the results don't align, all characters have the least trusted origin.
    """
    text = str.__str__(call(args, named))
    inputs = [*args, *named.values()]
    if any(not isinstance(value, str) and survey(value)[0] == UNTRUSTED for value in inputs):
        return labelled(text, (template, inputs))
    fillers = [chr(_FIRST_FILLER + n % _FILLERS) * len(v) if isinstance(v, str) else v for n, v in enumerate(inputs)]
    if len(inputs) > _FILLERS or _FILLED.search(template) or _FILLED.search(text):
        return labelled(text, (template, inputs))
    try:
        filled = str.__str__(call(fillers[: len(args)], dict(zip(named, fillers[len(args) :], strict=True))))
    except Exception:  # the same arguments were valid, so a format that depends on their text
        return labelled(text, (template, inputs))
    return _aligned(trace(template), text, filled, inputs)


def _aligned(template: TracedText, text: str, filled: str, inputs: list[Any]) -> str:
    own = bytes([survey(template)[0]])
    origin, at = [], 0
    for run in _FILLED.finditer(filled):
        value = inputs[ord(run[1]) - _FIRST_FILLER]
        origin += [own * (run.start() - at), bytes([survey(value)[0]]) * len(run[0])]
        if text[at : run.start()] != filled[at : run.start()]:
            return labelled(text, (template, inputs))
        at = run.end()
    if len(text) != len(filled) or text[at:] != filled[at:]:
        return labelled(text, (template, inputs))
    return TracedText(text, b"".join([*origin, own * (len(text) - at)]), survey((template, inputs))[1])
