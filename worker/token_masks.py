"""Token masks of the sequences in a runner's slots: matchers, their errors, what else is masked.

A runner starts a `SlotMask` with each sequence that has a grammar, passes it every returned id, and
has it filled before each draw. Errors of a matcher are kept in the mask and never raised: they end
that sequence alone. Protocols: `worker/sampling.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from worker.errors import InvalidRequest, as_exception

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from worker.model import SlotStart
    from worker.sampling import TokenMask

_LONGEST_REASON = 500
"""Characters of a matcher's exception that an error's message contains."""


class SlotMask:
    """The mask of one sequence. Once `error` is set, the matcher is not used again."""

    def __init__(self, start: SlotStart, always: NDArray[np.uint32], early: NDArray[np.uint32]) -> None:
        self.error: InvalidRequest | None = None
        self.ended = False
        """Whether the newest id ends the sequence, which has no next draw then."""
        self.index = 0
        """Index of the next draw."""
        self._start, self._always, self._early = start, always, early
        self._mask: TokenMask | None = None
        grammar = start.sampling.grammar
        assert grammar is not None, "a sequence without a grammar has no mask"
        try:
            self._mask = grammar.start()
        except BaseException as error:
            self._fail(error)

    @property
    def due(self) -> bool:
        """Whether the next draw requires a mask: it is none of `replay`, and there is one."""
        return not self.ended and self.index >= len(self._start.replay)

    def accept(self, token_id: int) -> None:
        """Append an id that the runner returns, in order."""
        if token_id in self._start.end_ids or self.index + 1 >= self._start.max_tokens:
            self.ended = True
        elif self._mask is not None:
            try:
                self._mask.accept(token_id)
            except BaseException as error:
                self._fail(error)
        self.index += 1

    def fill(self, words: NDArray[np.uint32]) -> None:
        """Write the mask of the next draw to `words` [⌈V/32⌉]; sets `error` if it allows no id."""
        if self._mask is None:
            return
        try:
            self._mask.fill(words)
        except BaseException as error:
            self._fail(error)
            return
        np.bitwise_and(words, self._always, out=words)
        early = self.index < self._start.sampling.min_tokens
        if _is_empty(words & self._early if early else words):
            before_end = early and not _is_empty(words)
            reason = "allows only the end of the answer, before min_tokens" if before_end else "allows none"
            self._refuse(f"no token can be drawn at index {self.index} of the answer: the grammar {reason}")

    def _fail(self, error: BaseException) -> None:
        """Keep an exception of the matcher; native code also raises BaseExceptions."""
        as_exception(error)  # raises what is no failure of the matcher
        where = f"at index {self.index} of the answer"
        if isinstance(error, InvalidRequest):
            self.error, self._mask = InvalidRequest(f"{error.message} ({where})", error.details), None
        else:
            reason = f"the grammar's matcher failed: {type(error).__name__}: {error}"[:_LONGEST_REASON]
            self._refuse(f"{reason} ({where})")

    def _refuse(self, constraint: str) -> None:
        self.error, self._mask = InvalidRequest.of(("response_format", constraint, None)), None


def _is_empty(words: NDArray[np.uint32]) -> bool:
    """Whether no bit is set. A comparison of bytes takes a fifth of the time of `any`."""
    return words.tobytes() == bytes(words.nbytes)


class SlotMasks:
    """Starts and fills the masks of one vocabulary's sequences.

    A mask never allows padding rows, nor ids from V on in its last word.
    """

    def __init__(self, vocab_size: int, padding_ids: Iterable[int], end_ids: Iterable[int]) -> None:
        self.words = -(-vocab_size // 32)
        """Words of a mask."""
        self._vocab_size = vocab_size
        self._always = self._all_but(padding_ids)
        self._end_ids = tuple(end_ids)

    def start(self, start: SlotStart) -> SlotMask | None:
        """The mask of a sequence that begins; None if it has no grammar. Check its `error`."""
        if start.sampling.grammar is None:
            return None
        early = self._always
        if start.sampling.min_tokens:
            early = early & self._all_but((*self._end_ids, *start.sampling.stop_token_ids))
        return SlotMask(start, self._always, early)

    def fill(self, masks: Sequence[SlotMask], words: NDArray[np.uint32]) -> None:
        """Write the masks of the next draws to the rows of `words` [≥ len(masks), ⌈V/32⌉]."""
        for mask, row in zip(masks, words, strict=False):
            mask.fill(row)

    def _all_but(self, ids: Iterable[int]) -> NDArray[np.uint32]:
        bits = np.zeros(32 * self.words, np.uint8)
        bits[: self._vocab_size] = 1
        bits[[i for i in ids if 0 <= i < self._vocab_size]] = 0
        return np.packbits(bits, bitorder="little").view(np.uint32)
