"""Values made of a fuzzer's bytes: the same bytes are the same value, with and without a fuzzer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

NUMBERS = (0, 1, -1, 2, 128, 2**31, 2**53, 2**63, 2**64 - 1, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308, 1e-320)
TEXTS = ("", "a", " ", "\n", "\0", "é", "世", "🌍", "\ud800", "\udfff", "\u2028", "<|im_end|>", "</think>", "x" * 300)


class Source:
    """Reads choices from bytes; zeros follow the last byte."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def is_empty(self) -> bool:
        return self._at >= len(self._data)

    def byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def choose(self, items: Sequence[T]) -> T:
        return items[self.byte() % len(items)]

    def text(self) -> str:
        """A text of `TEXTS`, or of the next bytes."""
        kind = self.byte()
        if kind < 32:
            return TEXTS[kind % len(TEXTS)]
        return self.bytes(kind % 24).decode(errors="surrogateescape" if kind % 7 == 0 else "replace")

    def bytes(self, size: int) -> bytes:
        found = self._data[self._at : self._at + size]
        self._at += size
        return found

    def rest(self) -> bytes:
        return self.bytes(len(self._data))

    def times(self, most: int) -> range:
        return range(0 if self.is_empty else self.byte() % (most + 1))

    def value(self, names: Sequence[str], words: Sequence[Any], depth: int = 0) -> Any:
        """A JSON value whose maps have keys of `names`, and whose leaves are often of `words`."""
        kind = self.byte() % 12
        if kind < 4:
            return self.choose(words)
        if kind < 8 and depth < 6:
            if kind % 2:
                return [self.value(names, words, depth + 1) for _ in self.times(3)]
            return {self.choose(names): self.value(names, words, depth + 1) for _ in self.times(4)}
        if kind == 8 and depth < 6:  # rarely deeper than the values that are made one by one
            levels = max(1, 16 * (self.byte() - 240))
            return json.loads("[" * levels + "]" * levels)
        if kind == 9:
            return self.choose(NUMBERS)
        return self.choose((None, True, False)) if kind == 10 else self.text()

    def fields(self, names: Sequence[str], inner: Sequence[str], words: Sequence[Any], most: int = 5) -> dict[str, Any]:
        """A map with fields of `names`."""
        return {self.choose(names): self.value(inner, words) for _ in self.times(most)}

    def map(self, function: Callable[[], T], most: int) -> list[T]:
        return [function() for _ in self.times(most)]
