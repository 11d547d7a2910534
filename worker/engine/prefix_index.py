"""The prefix index: the KV blocks that hold prompts, as a tree of block contents.

A node stands for a block's token ids and all ids before them. Prefill computes a token the same way
in every batch, so equal nodes mean equal K and V, bit for bit. Readers of blocks are counted in
`kv_blocks.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt

from worker.ops import KV_BLOCK

ROOT = 0
"""The node before a prompt's first block."""
_MISSING = -1


def split_full_blocks(prompt: Sequence[int] | npt.NDArray[np.integer[Any]]) -> list[bytes]:
    """The ids of each full block of a prompt, u32 little-endian."""
    ids, size = np.asarray(prompt, "<u4").tobytes(), 4 * KV_BLOCK
    return [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]


class PrefixIndex:
    """A one-to-one map of nodes and blocks. `block in index` is true if the block can be found.

    Node numbers are never reused: the children of a removed block are not found below its
    successor.
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
            node = self._nodes.get((node, content), _MISSING)
            if node == _MISSING:
                break
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
