"""Accounting of KV blocks: which are used, cached and free. The runner owns their storage.

A block is used (sequences read it), cached (no sequence reads it, but `prefix_index.py` can find
its content) or free. New content goes to free blocks first, then to cached ones, least recently
read first.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from worker.engine.prefix_index import ROOT, PrefixIndex
from worker.ops import KV_BLOCK, Ints


def blocks_for(tokens: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // KV_BLOCK)


class KvBlocks:
    """A pool of `count` blocks. `order` is the order in which they are handed out, for tests.

    Never-used blocks are a counter, so that a pool of a million blocks costs nothing to create and
    to count.
    """

    def __init__(self, count: int, order: Ints | None = None) -> None:
        self.count = count
        self._free: list[int] = [] if order is None else order[::-1].tolist()
        self._untouched = 0 if order is None else count
        """Blocks from this number on were never handed out."""
        self._cached: dict[int, None] = {}  # least recently read first
        self._readers = np.zeros(count, np.int32)
        self._used = 0
        self._index = PrefixIndex()

    @property
    def states(self) -> dict[str, int]:
        """How many blocks are used, cached and free: `count` in all."""
        cached = len(self._cached)
        return {"used": self._used, "cached": cached, "free": self.count - self._used - cached}

    def hold_prefix(self, full_blocks: Iterable[bytes]) -> tuple[Ints, int]:
        """Hold the longest cached beginning of a prompt, given its full blocks.

        Returns their table, for `extend` and `release`, and the last block's node for `cache`.
        """
        found = self._index.find(full_blocks)
        table = np.array(found, np.int32)
        for block in found:
            self._cached.pop(block, None)
        self._add_readers(table)
        return table, self._index.node(found[-1]) if found else ROOT

    def extend(self, table: Ints, count: int) -> Ints | None:
        """Extend a held table to `count` blocks with blocks that no other table has.

        Returns None, and changes nothing, if too few blocks are free or cached.
        """
        missing = count - len(table)
        if missing > self.count - self._used:
            return None
        added = np.array([self._next_free() for _ in range(missing)], np.int32)
        self._add_readers(added)
        return np.concatenate([table, added])

    def release(self, table: Ints) -> None:
        """Remove one reader from each block of a table, whose last block is evicted first."""
        if not len(table):
            return
        self._readers[table] -= 1
        unread = table[self._readers[table] == 0].tolist()
        self._used -= len(unread)
        for block in reversed(unread):
            if block in self._index:
                self._cached[block] = None
            else:
                self._free.append(block)

    def cache(self, block: int, content: bytes, parent: int) -> int:
        """Index a block that prefill has filled as a child of `parent`; returns its node."""
        return self._index.insert(parent, content, block)

    def clear_cache(self) -> None:
        """Empty the prefix cache. Blocks in use stay in use, but are no longer found."""
        self._index.clear()
        self._free.extend(reversed(self._cached))
        self._cached.clear()

    def _add_readers(self, table: Ints) -> None:
        self._used += int(np.count_nonzero(self._readers[table] == 0))
        self._readers[table] += 1  # no block is twice in a table

    def _next_free(self) -> int:
        """Remove and return a free block, else the cached block that was read longest ago."""
        if self._free:
            return self._free.pop()
        if self._untouched < self.count:
            self._untouched += 1
            return self._untouched - 1
        block = next(iter(self._cached))
        del self._cached[block]
        self._index.remove(block)
        return block
