"""Slots in host memory: make batches and draw requests of chunks and slots. Next: `runner.py`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Protocol

import numpy as np
import numpy.typing as npt

from worker.errors import InvalidRequest
from worker.model import MAX_DRAFT_ROWS, Chunk, DraftSupport, OnLaunched, SlotDraw, SlotStart, StepWait
from worker.ops import Batch, Ints, Phase
from worker.sampling import Draw, DrawRequest
from worker.token_masks import SlotMask, SlotMasks


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
    mask: SlotMask | None = None
    draft: Sequence[int] = ()
    """Tokens that the next step verifies."""
    allowed: npt.NDArray[np.uint32] | None = None
    """The mask of the next draw."""

    def prepare(self, masks: SlotMasks) -> InvalidRequest | None:
        """Compute the mask of the next draw, if it needs one; returns the mask's error."""
        if self.mask is None:
            return None
        self.allowed = None
        if self.mask.due:
            self.allowed = np.empty(masks.words, np.uint32)
            masks.fill([self.mask], self.allowed[None])
        return self.mask.error

    def next_draws(self) -> list[DrawRequest]:
        """The request for the token of index len(generated), and those after each draft token."""
        index, replay = len(self.generated), self.start.replay
        forced = replay[index] if index < len(replay) else None
        before = [[*self.generated, *self.draft[:count]] for count in range(1, len(self.draft) + 1)]
        return [
            DrawRequest(self.start.sampling, index, self.start.prompt, self.generated, forced, self.allowed),
            *(DrawRequest(self.start.sampling, len(ids), self.start.prompt, ids) for ids in before),
        ]

    def accept(self, draws: Iterator[Draw | None]) -> tuple[list[Draw | None], bool]:
        """Append the draws that are valid; return them, and whether the sequence has a next one."""
        valid: list[Draw | None] = []
        draft, self.draft = self.draft, ()
        drawn = list(islice(draws, 1 + len(draft)))
        for draw, guess in zip(drawn, (*draft, None), strict=True):
            valid.append(draw)
            if not self.continues_after(draw):
                return valid, False
            if draw is not None and draw.id != guess:
                break
        return valid, True

    def continues_after(self, draw: Draw | None) -> bool:
        """Append the drawn token; return whether the sequence has a next one."""
        if draw is None:
            return False
        self.generated.append(draw.id)
        if self.mask is not None:
            self.mask.accept(draw.id)
        return draw.id not in self.start.end_ids and len(self.generated) < self.start.max_tokens


class HostSlots:
    """The slots' part of `worker.model.Runner`, over a function that computes one batch at a time.

    Without lookahead: a call draws the first token of the slots that begin, and the next token of
    the slots that generated before it.
    """

    step_wait: StepWait | None = None

    def __init__(self, slots: int, compute: Compute, masks: SlotMasks) -> None:
        self.slots = slots
        self._masks = masks
        # Rows are computed one after another, so a draft token costs a token.
        self.drafts: DraftSupport | None = DraftSupport(0, {rows: rows for rows in range(1, MAX_DRAFT_ROWS + 1)}, 0.0)
        self._compute = compute
        self._generating: dict[int, _Slot] = {}

    def run(self, chunks: Sequence[Chunk], on_launched: OnLaunched = lambda: None) -> list[SlotDraw]:
        on_launched()
        generating = self._generating.copy()
        draws = [draw for chunk in chunks for draw in self._prefill(chunk)]
        return draws + self._decode(generating) if generating else draws

    def first_draws(self) -> list[SlotDraw]:
        return []  # `run` has returned all draws

    def extend(self, slot: int, block_table: Ints) -> None:
        if slot in self._generating:
            self._generating[slot].table = block_table

    def propose(self, slot: int, draft: Sequence[int]) -> None:
        if slot in self._generating:
            assert self._generating[slot].mask is None, "draft tokens of a sequence with a grammar"
            self._generating[slot].draft = draft

    def stop(self, slot: int) -> None:
        self._generating.pop(slot, None)

    def reset(self) -> None:
        self._generating.clear()

    def _prefill(self, chunk: Chunk) -> list[SlotDraw]:
        if chunk.begin is None:
            self._compute(chunk.batch(), [])
            return []
        assert 0 <= chunk.begin.slot < self.slots
        slot = _Slot(chunk.begin, chunk.block_table, mask=self._masks.start(chunk.begin))
        if failed := self._prepare({chunk.begin.slot: slot}):
            self._compute(replace(chunk, begin=None).batch(), [])  # other sequences may read its blocks
            return failed
        return self._draw(chunk.batch(), {chunk.begin.slot: slot})

    def _prepare(self, slots: dict[int, _Slot]) -> list[SlotDraw]:
        """Compute the masks of the next draws; stops the slots whose masks have errors."""
        failed: list[SlotDraw] = []
        for number, slot in list(slots.items()):
            error = slot.prepare(self._masks)
            if error is not None:
                failed.append(SlotDraw(number, error))
                del slots[number]
                self._generating.pop(number, None)
        return failed

    def _decode(self, slots: dict[int, _Slot]) -> list[SlotDraw]:
        failed = self._prepare(slots)
        return failed + self._step(slots) if slots else failed

    def _step(self, slots: dict[int, _Slot]) -> list[SlotDraw]:
        tokens: list[int] = []
        positions: list[int] = []
        tables: list[Ints] = []
        for each in slots.values():
            ids = [each.generated[-1], *each.draft]
            first = len(each.start.prompt) + len(each.generated) - 1
            tokens += ids
            positions += range(first, first + len(ids))
            tables += [each.table] * len(ids)
        rows = np.arange(len(tokens), dtype=np.int32)
        batch = Batch(Phase.DECODE, np.array(tokens, np.int32), np.array(positions, np.int32), tuple(tables), rows)
        return self._draw(batch, slots)

    def _draw(self, batch: Batch, slots: dict[int, _Slot]) -> list[SlotDraw]:
        rows = iter(self._compute(batch, [request for each in slots.values() for request in each.next_draws()]))
        draws: list[SlotDraw] = []
        for number, slot in slots.items():
            valid, continues = slot.accept(rows)
            draws += [SlotDraw(number, draw) for draw in valid]
            if continues:
                self._generating[number] = slot
            else:
                self._generating.pop(number, None)
        return draws
