"""Grammars for tests of the layers below the text: masks that are a function of the accepted ids."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np

from worker.errors import InvalidRequest


def packed(allowed, words):
    """The mask of a boolean array [V], in that many words."""
    bits = np.zeros(32 * words, np.uint8)
    bits[: len(allowed)] = allowed
    return np.packbits(bits, bitorder="little").view(np.uint32)


@dataclass(frozen=True)
class DigestGrammar:
    """Which of the first `size` ids are allowed, depends on all ids before: one to eight, or half.

    `allowed(ids)` is the definition.
    """

    size: int
    seed: int = 0

    def start(self):
        return Matcher(self)

    def allowed(self, ids):
        """Which ids may follow: a boolean array of `size`."""
        rng = np.random.default_rng(zlib.crc32(np.array([self.seed, *ids], np.int64)))
        if rng.integers(4) == 0:
            return rng.integers(0, 2, self.size).astype(bool)
        allowed = np.zeros(self.size, bool)
        allowed[rng.integers(0, self.size, rng.integers(1, 9))] = True
        return allowed


class Matcher:
    """The mask of one sequence. Refuses an id that the definition does not allow."""

    def __init__(self, grammar):
        self.grammar, self.ids = grammar, []

    def accept(self, token_id):
        if not self.grammar.allowed(self.ids)[token_id]:
            raise InvalidRequest.of(("response_format", f"id {token_id} is not allowed", None))
        self.ids.append(token_id)

    def fill(self, mask):
        mask[:] = packed(self.grammar.allowed(self.ids), len(mask))


@dataclass(frozen=True)
class ListGrammar:
    """Allows the ids `steps[i]` at index i, and those of the last step from then on."""

    steps: tuple[tuple[int, ...], ...]
    size: int

    def start(self):
        return Matcher(self)

    def allowed(self, ids):
        allowed = np.zeros(self.size, bool)
        allowed[list(self.steps[min(len(ids), len(self.steps) - 1)])] = True
        return allowed


class NativePanic(BaseException):
    """Stands for pyo3's PanicException, which is no Exception."""


@dataclass(frozen=True)
class FaultyGrammar(DigestGrammar):
    """At index `at`, the method `fault` raises `error`; "empty" allows no id instead."""

    fault: str = "fill"
    at: int = 0
    error: BaseException = field(default_factory=lambda: NativePanic("index out of range"))

    def start(self):
        if self.fault == "start":
            raise self.error
        return FaultyMatcher(self)


class FaultyMatcher(Matcher):
    """The mask of a sequence with a FaultyGrammar."""

    def accept(self, token_id):
        self._raise_at("accept")
        super().accept(token_id)

    def fill(self, mask):
        self._raise_at("fill")
        super().fill(mask)
        if self.grammar.fault == "empty" and len(self.ids) == self.grammar.at:
            mask[:] = 0

    def _raise_at(self, method):
        if self.grammar.fault == method and len(self.ids) == self.grammar.at:
            raise self.grammar.error
