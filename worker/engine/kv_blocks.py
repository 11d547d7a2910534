"""Who owns which KV block: integers only; the storage itself belongs to the runner.

The door for the prefix cache: a block that prefill filled can be shared once blocks are counted by their readers.
"""

from __future__ import annotations

import numpy as np

from worker.ops import KV_BLOCK, Ints


def blocks_for(tokens: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // KV_BLOCK)


class KvBlocks:
    """A pool of block numbers. `order` is the order in which they are handed out; tests shuffle it."""

    def __init__(self, count: int, order: Ints | None = None) -> None:
        self.count = count
        self._free = list(reversed(range(count) if order is None else order.tolist()))

    @property
    def free(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free)

    def take(self, count: int) -> Ints | None:
        """`count` blocks as a block table, or None, and nothing taken, where fewer are free."""
        if count > len(self._free):
            return None
        return np.array([self._free.pop() for _ in range(count)], np.int32)

    def give_back(self, table: Ints) -> None:
        """Return a table's blocks."""
        self._free.extend(reversed(table.tolist()))
