"""Slots in host memory: make batches and draw requests of chunks and slots. Next: `runner.py`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from worker.model import Chunk, OnLaunched, SlotDraw, SlotStart
from worker.ops import Batch, Ints, Phase
from worker.sampling import Draw, DrawRequest


class Compute(Protocol):
    """The computation of one batch."""

    def __call__(self, batch: Batch, requests: Sequence[DrawRequest]) -> Sequence[Draw | None]:
        """A draw for each of the batch's `logit_rows`; None where none can be drawn."""


@dataclass(slots=True)
class _Slot:
    """A generating slot."""

    start: SlotStart
    table: Ints
    generated: list[int] = field(default_factory=list)

    def next_draw(self) -> DrawRequest:
        """The request for the token of index len(generated)."""
        index, replay = len(self.generated), self.start.replay
        forced = replay[index] if index < len(replay) else None
        return DrawRequest(self.start.sampling, index, self.start.prompt, self.generated, forced)

    def continues_after(self, draw: Draw | None) -> bool:
        """Append the drawn token; return whether the sequence has a next one."""
        if draw is None:
            return False
        self.generated.append(draw.id)
        return draw.id not in self.start.end_ids and len(self.generated) < self.start.max_tokens


class HostSlots:
    """The slots' part of `worker.model.Runner`, over a function that computes one batch at a time.

    Without lookahead: a call draws the first token of the slots that begin, and the next token of
    the slots that generated before it.
    """

    def __init__(self, slots: int, compute: Compute) -> None:
        self.slots = slots
        self._compute = compute
        self._generating: dict[int, _Slot] = {}

    def run(self, chunks: Sequence[Chunk], on_launched: OnLaunched = lambda: None) -> list[SlotDraw]:
        on_launched()
        generating = self._generating.copy()
        draws = [draw for chunk in chunks for draw in self._prefill(chunk)]
        return draws + self._decode(generating) if generating else draws

    def extend(self, slot: int, block_table: Ints) -> None:
        if slot in self._generating:
            self._generating[slot].table = block_table

    def stop(self, slot: int) -> None:
        self._generating.pop(slot, None)

    def reset(self) -> None:
        self._generating.clear()

    def _prefill(self, chunk: Chunk) -> list[SlotDraw]:
        if chunk.begin is None:
            self._compute(chunk.batch(), [])
            return []
        assert 0 <= chunk.begin.slot < self.slots
        return self._draw(chunk.batch(), {chunk.begin.slot: _Slot(chunk.begin, chunk.block_table)})

    def _decode(self, slots: dict[int, _Slot]) -> list[SlotDraw]:
        tokens = np.array([each.generated[-1] for each in slots.values()], np.int32)
        ahead = [len(each.start.prompt) + len(each.generated) - 1 for each in slots.values()]
        tables = tuple(each.table for each in slots.values())
        rows = np.arange(len(slots), dtype=np.int32)
        return self._draw(Batch(Phase.DECODE, tokens, np.array(ahead, np.int32), tables, rows), slots)

    def _draw(self, batch: Batch, slots: dict[int, _Slot]) -> list[SlotDraw]:
        draws = self._compute(batch, [each.next_draw() for each in slots.values()])
        for (number, slot), draw in zip(slots.items(), draws, strict=True):
            if slot.continues_after(draw):
                self._generating[number] = slot
            else:
                self._generating.pop(number, None)
        return [SlotDraw(number, draw) for number, draw in zip(slots, draws, strict=True)]
