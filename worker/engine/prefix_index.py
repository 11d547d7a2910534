"""What the KV blocks that prefill wrote hold: a digest of a block's tokens and all before them names its content.

Equal digests mean equal K and V, bit for bit: prefill computes a token the same way whatever shares the call. It knows
no device and counts no readers; that is `kv_blocks.py`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from worker.ops import KV_BLOCK


def block_digests(prompt: Sequence[int] | npt.NDArray[np.integer[Any]]) -> list[bytes]:
    """One for each whole block of a prompt: SHA-256 of all ids up to its end, u32 little-endian.

    Prompts that differ anywhere before a block's end have other digests there, as sure as SHA-256 has no collision.
    """
    ids, so_far = memoryview(np.asarray(prompt, "<u4").tobytes()), hashlib.sha256()
    size, digests = 4 * KV_BLOCK, []
    for start in range(0, len(ids) - size + 1, size):
        so_far.update(ids[start : start + size])
        digests.append(so_far.digest())
    return digests


class PrefixIndex:
    """Digest to block and back, one to one. `block in index` says whether its content can be found."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._digests

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """The blocks of the longest beginning of `digests` that is known whole."""
        blocks: list[int] = []
        for digest in digests:
            block = self._blocks.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def enter(self, digest: bytes, block: int) -> None:
        """From now on `block` is found; where another block holds the same, that one stays the one that is."""
        if digest not in self._blocks:
            self._blocks[digest] = block
            self._digests[block] = digest

    def drop(self, block: int) -> None:
        """The block is about to be written anew."""
        del self._blocks[self._digests.pop(block)]

    def clear(self) -> None:
        """Nothing is known any more."""
        self._blocks.clear()
        self._digests.clear()
