"""Prompt lookup: the tokens that followed an earlier occurrence of a sequence's last tokens.

Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding; `ngram` in vLLM. Next:
`speculation.py`, which decides whether a proposal is verified.
"""

import numpy as np

from worker.ops import Ints

_MIN_NGRAM = 3
_MAX_NGRAM = 8
"""Tokens that are compared at most: among occurrences, the longest match is chosen."""


class NgramProposer:
    """The tokens of one sequence, and what it may repeat. Longest sequence: `capacity` tokens."""

    def __init__(self, tokens: list[int] | Ints, capacity: int) -> None:
        self._ids = np.empty(capacity, np.int32)
        self._count = 0
        self._source: int | None = None
        """The position whose token is expected next; None: not known."""
        self.followed = 0
        """Tokens that have followed the found occurrence as expected."""
        self.append(tokens)

    def append(self, tokens: list[int] | Ints) -> None:
        """Add tokens. An occurrence is kept as long as its successors equal them."""
        new = np.asarray(tokens, np.int32)
        first, self._count = self._count, self._count + len(new)
        self._ids[first : self._count] = new
        if self._source is not None and len(new):
            expected = self._ids[self._source : self._source + len(new)]
            equal = np.array_equal(expected, new)
            self._source = self._source + len(new) if equal else None
            self.followed = self.followed + len(new) if equal else 0

    def propose(self, count: int) -> list[int]:
        """The next `count` tokens, or none if the last _MIN_NGRAM tokens have not occurred before.

        A repetition that reaches the end of the sequence is continued with itself.
        """
        if self._source is None:
            self._source = self._find()
        if self._source is None:
            return []
        at = self._source + np.arange(count) % (self._count - self._source)
        ids: list[int] = self._ids[at].tolist()
        return ids

    def _find(self) -> int | None:
        """The position after the newest of the longest occurrences of the last tokens."""
        ids, last = self._ids, self._count - 1
        if last < _MIN_NGRAM:
            return None
        ends = np.flatnonzero(ids[:last] == ids[last])
        for back in range(1, _MAX_NGRAM):
            ends, shorter = ends[ends >= back], ends
            ends = ends[ids[ends - back] == ids[last - back]]
            if not len(ends):
                return int(shorter[-1]) + 1 if back >= _MIN_NGRAM else None
        return int(ends[-1]) + 1
