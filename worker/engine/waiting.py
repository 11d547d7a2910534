"""The order in which waiting sequences start: priority with aging, then tenants in turn, then age.

Next: `scheduler.py`.
"""

from collections import OrderedDict
from collections.abc import Iterator

from worker.engine.sequence import Sequence

AGING_STEPS = 500
"""Steps after which a sequence that waits counts as one priority class more urgent."""
_MAX_TENANTS = 4096
"""Tenants whose last turn is remembered."""


def urgency(sequence: Sequence, step: int) -> int:
    """The sequence's priority at a step, lower first: each AGING_STEPS steps of waiting take 1."""
    return sequence.priority - (step - sequence.queued_at) // AGING_STEPS


class WaitingSequences:
    """Sequences that wait for a slot and for KV blocks."""

    def __init__(self) -> None:
        self._sequences: dict[Sequence, None] = {}
        self._turns: OrderedDict[str, int] = OrderedDict()
        self._turn = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def add(self, sequence: Sequence) -> None:
        """Add a sequence, new or preempted."""
        self._sequences[sequence] = None

    def first(self, step: int) -> Sequence:
        """The sequence that starts next.

        The most urgent one; among those a preempted one; then one of the tenant whose last start
        is longest ago; then the oldest.
        """

        def order(sequence: Sequence) -> tuple[int, bool, int, int]:
            turn = self._turns.get(sequence.tenant, 0)
            return urgency(sequence, step), not sequence.preempted, turn, sequence.arrival

        return min(self._sequences, key=order)

    def start(self, sequence: Sequence) -> None:
        """Remove a sequence that starts, which is its tenant's turn."""
        del self._sequences[sequence]
        self._turn += 1
        self._turns[sequence.tenant] = self._turn
        self._turns.move_to_end(sequence.tenant)
        if len(self._turns) > _MAX_TENANTS:
            self._turns.popitem(last=False)

    def discard(self, sequence: Sequence) -> None:
        """Remove a sequence that does not start; does nothing if it does not wait."""
        self._sequences.pop(sequence, None)
