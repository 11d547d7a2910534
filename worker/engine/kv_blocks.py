"""KV blocks and the prefix cache: which blocks are used, cached and free, and what they hold.

A block is used (sequences read it), cached (no sequence reads it, but its content can be found) or
free. New content goes to free blocks first, then to cached ones, least recently read first. Prefill
computes a token the same way in every batch, so blocks with equal token ids and equal ids before
them hold equal K and V, bit for bit. The runner (`worker/model.py`) owns the storage.
"""

from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt

from worker.ops import KV_BLOCK, Ints

ROOT = 0
"""The node before a prompt's first block."""


def blocks_for(tokens: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // KV_BLOCK)


def split_full_blocks(prompt: Sequence[int] | npt.NDArray[np.integer[Any]]) -> list[bytes]:
    """The ids of each full block of a prompt, u32 little-endian."""
    ids, size = np.asarray(prompt, "<u4").tobytes(), 4 * KV_BLOCK
    return [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]


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

    def extend(self, table: Ints, count: int, leave: int = 0) -> Ints | None:
        """Extend a held table to `count` blocks with blocks that no other table has.

        Returns None, and changes nothing, if fewer than `leave` blocks would stay free or cached.
        """
        missing = count - len(table)
        if missing + leave > self.count - self._used:
            return None
        added = np.array([self._next_free() for _ in range(missing)], np.int32)
        self._add_readers(added)
        return np.concatenate([table, added])

    def release(self, table: Ints) -> None:
        """Remove one reader from each block of a table, whose last block is evicted first."""
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


class PrefixIndex:
    """A tree of block contents, whose nodes and blocks map one to one.

    `block in index` is true if the block can be found. Node numbers are never reused: the children
    of a removed block are not found below its successor.
    """

    def __init__(self) -> None:
        self._nodes: dict[tuple[int, bytes], int] = {}
        self._blocks: dict[int, int] = {}
        self._keys: dict[int, tuple[int, bytes]] = {}
        self._unused = count(ROOT + 1)

    def __contains__(self, block: int) -> bool:
        return block in self._keys

    def find(self, full_blocks: Iterable[bytes]) -> list[int]:
        """The blocks that hold the longest indexed beginning of a prompt, given its full blocks."""
        node, blocks = ROOT, []
        for content in full_blocks:
            child = self._nodes.get((node, content))
            if child is None:
                break
            node = child
            blocks.append(self._blocks[node])
        return blocks

    def node(self, block: int) -> int:
        """The node of an indexed block."""
        return self._nodes[self._keys[block]]

    def insert(self, parent: int, content: bytes, block: int) -> int:
        """Insert `block` as the child of `parent` with this content; returns the child's node.

        A child that exists keeps its block. Below a removed parent nothing could be found, so
        nothing is inserted and `parent` is returned.
        """
        if parent != ROOT and parent not in self._blocks:
            return parent
        key = parent, content
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = next(self._unused)
            self._blocks[node], self._keys[block] = block, key
        return node

    def remove(self, block: int) -> None:
        """Remove an indexed block, before its content is overwritten."""
        del self._blocks[self._nodes.pop(self._keys.pop(block))]

    def clear(self) -> None:
        """Remove every block."""
        for each in (self._nodes, self._blocks, self._keys):
            each.clear()
