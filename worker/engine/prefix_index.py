"""What the KV blocks that prefill wrote hold: a tree, in which a block's ids and its parent's place make up its place.

So one place means equal ids, those before included, and equal K and V, bit for bit: prefill computes a token the same
way whatever shares the call. It knows no device and counts no readers; that is `kv_blocks.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt

from worker.ops import KV_BLOCK

ROOT = 0
"""The place before a prompt's first block."""
_NOWHERE = -1


def whole_blocks(prompt: Sequence[int] | npt.NDArray[np.integer[Any]]) -> list[bytes]:
    """The ids of each whole block of a prompt, u32 little-endian."""
    ids, size = np.asarray(prompt, "<u4").tobytes(), 4 * KV_BLOCK
    return [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]


class PrefixIndex:
    """Place to block and back, one to one. `block in index` says whether its content can be found.

    A place is a number that is never used again: what followed a dropped block can't be found behind its successor.
    """

    def __init__(self) -> None:
        self._places: dict[tuple[int, bytes], int] = {}
        self._blocks: dict[int, int] = {}
        self._keys: dict[int, tuple[int, bytes]] = {}
        self._unused = count(ROOT + 1)

    def __contains__(self, block: int) -> bool:
        return block in self._keys

    def find(self, contents: Iterable[bytes]) -> list[int]:
        """The blocks of the longest beginning of `contents`, a prompt's whole blocks, that is known."""
        place, blocks = ROOT, []
        for content in contents:
            place = self._places.get((place, content), _NOWHERE)
            if place == _NOWHERE:
                break
            blocks.append(self._blocks[place])
        return blocks

    def place(self, block: int) -> int:
        """Where a block that can be found stands."""
        return self._places[self._keys[block]]

    def enter(self, parent: int, content: bytes, block: int) -> int:
        """Where `content` stands after `parent`: from now on `block` is found there, unless another one is already.

        Behind a parent that was dropped nothing can be found, so nothing is entered: the place is the parent's still.
        """
        if parent != ROOT and parent not in self._blocks:
            return parent
        key = parent, content
        place = self._places.get(key)
        if place is None:
            place = self._places[key] = next(self._unused)
            self._blocks[place], self._keys[block] = block, key
        return place

    def drop(self, block: int) -> None:
        """The block is about to be written anew."""
        del self._blocks[self._places.pop(self._keys.pop(block))]

    def clear(self) -> None:
        """Nothing is known any more."""
        for each in (self._places, self._blocks, self._keys):
            each.clear()
