"""Which parts of a slab are free: first fit over offsets, integers only, the same answer to the same questions.

Knows no device and no array. `worker/gpu/memory.py` puts it over device memory.
"""

from __future__ import annotations

from bisect import bisect_left


class FreeList:
    """Holes of a slab of `size` bytes, as (offset, size) in rising order; neighbours are always merged."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._holes: list[tuple[int, int]] = [(0, size)] if size else []

    @property
    def free(self) -> int:
        """Bytes in all holes."""
        return sum(size for _, size in self._holes)

    def take(self, size: int) -> int | None:
        """The offset of `size` bytes from the beginning of the first hole that holds them; None if none does."""
        for index, (offset, room) in enumerate(self._holes):
            if room >= size:
                rest = [(offset + size, room - size)] if room > size else []
                self._holes[index : index + 1] = rest
                return offset
        return None

    def give(self, offset: int, size: int) -> None:
        """Give back what `take` gave."""
        at = bisect_left(self._holes, (offset, 0))
        end = offset + size
        if at < len(self._holes) and self._holes[at][0] == end:
            end += self._holes.pop(at)[1]
        if at and sum(self._holes[at - 1]) == offset:
            at -= 1
            offset = self._holes.pop(at)[0]
        self._holes.insert(at, (offset, end - offset))
