"""Who reads which KV block: integers only; the storage itself belongs to the runner.

A block is used (sequences read it), cached (nobody does, but its content may be wanted again) or free. New content goes
to free blocks first, then to cached ones, least recently read first. What a block holds is `prefix_index.py`'s to know.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from worker.engine.prefix_index import ROOT, PrefixIndex
from worker.ops import KV_BLOCK, Ints


def blocks_for(tokens: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // KV_BLOCK)


class KvBlocks:
    """A pool of block numbers. `order` is the order in which they are handed out; tests shuffle it."""

    def __init__(self, count: int, order: Ints | None = None) -> None:
        self.count = count
        self._free: list[int] = list(reversed(range(count) if order is None else order.tolist()))
        self._cached: dict[int, None] = {}  # least recently read first
        self._readers = np.zeros(count, np.int32)
        self._index = PrefixIndex()

    @property
    def states(self) -> dict[str, int]:
        """How many blocks are used, cached and free: `count` in all."""
        return {"used": int(np.count_nonzero(self._readers)), "cached": len(self._cached), "free": len(self._free)}

    def find(self, contents: Iterable[bytes]) -> list[int]:
        """The blocks that hold the longest known beginning of a prompt, given its `whole_blocks`."""
        return self._index.find(contents)

    def place(self, found: Sequence[int]) -> int:
        """Where a prompt goes on in the index after the blocks that were found."""
        return self._index.place(found[-1]) if found else ROOT

    def take(self, count: int, prefix: Sequence[int] = ()) -> Ints | None:
        """A block table of `count` blocks that begins with those just found; or None, and nothing taken.

        The blocks of `prefix` get one more reader, the others are nobody else's. None where too few are left.
        """
        fresh, cached = count - len(prefix), [block for block in prefix if block in self._cached]
        if fresh > len(self._free) + len(self._cached) - len(cached):
            return None
        for block in cached:
            del self._cached[block]
        table = np.array([*prefix, *(self._fresh() for _ in range(fresh))], np.int32)
        self._readers[table] += 1  # no block is twice in a table
        return table

    def give_back(self, table: Ints) -> None:
        """One reader less of a table's blocks. Of those that end up cached its last becomes the first to go."""
        if not len(table):
            return
        self._readers[table] -= 1
        for block in reversed(table[self._readers[table] == 0].tolist()):
            if block in self._index:
                self._cached[block] = None
            else:
                self._free.append(block)

    def keep(self, block: int, content: bytes, place: int) -> int:
        """Prefill has written the block whole: let others find it, and keep its content as long as there is room.

        `place` is where the prompt stands before it; the result is where it stands after it.
        """
        return self._index.enter(place, content, block)

    def forget(self) -> None:
        """Drop what is cached; who reads a block goes on reading it."""
        self._index.clear()
        self._free.extend(reversed(self._cached))
        self._cached.clear()

    def _fresh(self) -> int:
        """A block to write: a free one, else the cached one that was read longest ago."""
        if self._free:
            return self._free.pop()
        block = next(iter(self._cached))
        del self._cached[block]
        self._index.drop(block)
        return block
