"""Who reads which KV block: integers only; the storage itself belongs to the runner.

A block is used (sequences read it), cached (nobody does, but its content may be wanted again) or free. New content goes
to free blocks first, then to cached ones, least recently read first. What a block holds is `prefix_index.py`'s to know.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from worker.engine.prefix_index import PrefixIndex
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
        self._readers: dict[int, int] = {}
        self._index = PrefixIndex()

    @property
    def states(self) -> dict[str, int]:
        """How many blocks are used, cached and free: `count` in all."""
        return {"used": len(self._readers), "cached": len(self._cached), "free": len(self._free)}

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """The blocks that hold the longest known beginning of a prompt, given its `block_digests`."""
        return self._index.find(digests)

    def take(self, count: int, prefix: Sequence[int] = ()) -> Ints | None:
        """A block table of `count` blocks that begins with those just found; or None, and nothing taken.

        The blocks of `prefix` get one more reader, the others are nobody else's. None where too few are left.
        """
        fresh = count - len(prefix)
        idle = len(self._free) + len(self._cached) - sum(block in self._cached for block in prefix)
        if fresh > idle:
            return None
        for block in prefix:
            self._cached.pop(block, None)
        table = [*prefix, *(self._fresh() for _ in range(fresh))]
        for block in table:
            self._readers[block] = self._readers.get(block, 0) + 1
        return np.array(table, np.int32)

    def give_back(self, table: Ints) -> None:
        """One reader less of a table's blocks. Of those that end up cached its last becomes the first to go."""
        for block in reversed(table.tolist()):
            self._readers[block] -= 1
            if self._readers[block]:
                continue
            del self._readers[block]
            if block in self._index:
                self._cached[block] = None
            else:
                self._free.append(block)

    def keep(self, block: int, digest: bytes) -> None:
        """Prefill has written the block whole: let others find it, and keep its content as long as there is room."""
        self._index.enter(digest, block)

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
