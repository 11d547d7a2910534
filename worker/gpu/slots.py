"""Host side of the slots: the sequences that generate, and their draws on the way to the host.

Decode steps are numbered. A sequence that begins after step n has its first draw before step n + 1
and is in every later step until it is stopped, so a step's number gives the index of each of its
draws. Accepted draft tokens count as steps: once they are read, the sequence is as if it had begun
so many steps earlier. The end of a sequence is decided on the device (`kernels/sampling.cuh`) and,
from the draws, by the caller. Next: `runner.py`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from worker.errors import InvalidRequest
from worker.gpu.sampler import DRAWN, INACTIVE
from worker.model import SlotDraw, SlotStart, StepWait
from worker.ops import KV_BLOCK, Ints
from worker.sampling import Draw
from worker.token_masks import SlotMask

_NEVER = 1 << 62
_Top = tuple[tuple[int, float], ...]


class Generation:
    """A sequence that generates in a slot, from `first_step` on, until it is no longer `live`."""

    __slots__ = (
        *("end_ids", "first_step", "last_step", "live", "mask", "replay", "reports_from", "slot", "table_step"),
        *("tokens", "unread_drafts"),
    )

    def __init__(self, start: SlotStart, table: Ints, first_step: int, mask: SlotMask | None) -> None:
        self.live = True
        self.mask = mask
        self.slot = start.slot
        self.tokens = len(start.prompt)
        self.replay = start.replay
        self.end_ids = start.end_ids
        self.unread_drafts = 0
        """Draft tokens of launched steps whose draws are not read."""
        self.first_step = first_step
        self.last_step = first_step + start.max_tokens - 1
        """The step that draws the last of `max_tokens` tokens."""
        self.reports_from = _NEVER if start.sampling.logprobs is None else first_step + len(start.replay)
        """The first step whose draw has log-probabilities: forced ids have none."""
        self.table_step = _NEVER
        """The last step whose token has a KV block."""
        self.hold(table)

    def hold(self, table: Ints) -> None:
        """Take over a block table."""
        last = self.first_step + len(table) * KV_BLOCK - self.tokens
        self.table_step = last if last < self.last_step else _NEVER

    def advance(self, accepted: int) -> None:
        """Count accepted draft tokens."""
        self.first_step -= accepted
        self.last_step -= accepted
        self.reports_from -= accepted
        self.table_step -= accepted

    def is_masked(self, step: int) -> bool:
        """Whether the draw of `step` requires a mask, unless the sequence ends before."""
        return self.mask is not None and self.first_step + len(self.replay) <= step <= self.last_step

    def forced(self, step: int) -> int | None:
        """The id that `step` must return, -1 for a draw; None if the device's is valid."""
        index = step - self.first_step
        if index > len(self.replay):
            return None
        return self.replay[index] if index < len(self.replay) else -1


@dataclass(frozen=True, slots=True)
class Launch:
    """Draws that are being copied to the host: `raw` is valid once `event` has completed."""

    rows: tuple[Generation, ...]
    step: int
    raw: np.ndarray[Any, Any]
    event: Any
    drafts: tuple[Sequence[int], ...] = ()
    """The draft tokens of each of `rows`, in rows after it; empty if there are none at all."""

    def timed_wait(self) -> StepWait:
        """Wait for the copy; return the times of the wait."""
        began_at = time.monotonic()
        self.event.synchronize()
        return StepWait(began_at, time.monotonic())

    def wait(self) -> np.ndarray[Any, Any]:
        """Wait for the copy and return the draws: at least one DRAWN for each of `rows`."""
        self.event.synchronize()
        return self.raw.view(DRAWN)


class Slots:
    """The sequences that generate in `count` slots."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.steps = 0
        """The number of the newest decode step."""
        self._generations: dict[int, Generation] = {}
        self._drafts: dict[int, Sequence[int]] = {}
        self._failed: list[SlotDraw] = []
        self._changed()

    @property
    def step_is_due(self) -> bool:
        """Whether a sequence has a token left that no launched step draws."""
        return self.steps < self._last_step

    def begin(self, start: SlotStart, table: Ints, mask: SlotMask | None = None) -> Generation:
        """Let a sequence generate in its slot; the draw of its first token is launched next."""
        self.stop(start.slot)
        generation = self._generations[start.slot] = Generation(start, table, self.steps, mask)
        self._changed()
        return generation

    def extend(self, slot: int, table: Ints) -> bool:
        """Note a slot's longer block table; whether the slot generates."""
        generation = self._generations.get(slot)
        if generation is None:
            return False
        generation.hold(table)
        self._changed()
        return True

    def propose(self, slot: int, draft: Sequence[int]) -> None:
        """Note draft tokens for the next step; does nothing if the slot does not generate.

        Raises: ValueError if the step returns an id of `replay`.
        """
        generation = self._generations.get(slot)
        if generation is None:
            return
        if generation.forced(self.steps + 1) is not None:
            raise ValueError(f"draft tokens for slot {slot}, whose ids are not all replayed")
        self._drafts[slot] = draft

    def take_drafts(self) -> tuple[Sequence[int], ...]:
        """Remove and return the draft tokens of each of `rows`; empty if there are none at all."""
        if not self._drafts:
            return ()
        drafts = tuple(self._drafts.get(slot, ()) for slot in self.numbers)
        self._drafts.clear()
        return drafts if any(drafts) else ()

    def stop(self, slot: int) -> None:
        """End generation in a slot; its draws that are not read yet are dropped. Idempotent."""
        generation = self._generations.pop(slot, None)
        self._drafts.pop(slot, None)
        self._failed = [each for each in self._failed if each.slot != slot]
        if generation is not None:
            generation.live = False
            self._changed()

    def clear(self) -> None:
        """Stop all slots."""
        for slot in list(self._generations):
            self.stop(slot)
        self._failed.clear()

    def fail(self, slot: int, error: InvalidRequest) -> None:
        """Stop a slot whose mask has an error, which `take_failed` returns."""
        self.stop(slot)
        self._failed.append(SlotDraw(slot, error))

    def take_failed(self) -> list[SlotDraw]:
        """Remove and return the errors of masks."""
        failed, self._failed = self._failed, []
        return failed

    def masked_in_step(self) -> bool:
        """Whether a row of the newest step requires a mask, unless its sequence ends before."""
        return any(each.is_masked(self.steps) for each in self._masked)

    def accept(self, draws: Sequence[SlotDraw]) -> None:
        """Let the masks of their sequences follow the ids that were read."""
        for slot, draw in draws if self._masked else ():
            generation = self._generations.get(slot)
            if generation is not None and generation.mask is not None and isinstance(draw, Draw):
                generation.mask.accept(draw.id)
        self.stop_failed()

    def stop_failed(self) -> None:
        """Stop the slots whose masks have errors."""
        for generation in self._masked:
            if generation.mask is not None and generation.mask.error is not None:
                self.fail(generation.slot, generation.mask.error)

    def next_step(self, drafts: Sequence[Sequence[int]] = ()) -> int:
        """Count a decode step. Raises: ValueError if a token of it has no KV block."""
        for generation, draft in zip(self.rows, drafts, strict=False):
            generation.unread_drafts += len(draft)
        # A step whose draft tokens are not read may have advanced a sequence by all of them.
        ahead = (self.steps + each.unread_drafts >= each.table_step for each in self.rows if each.unread_drafts)
        if self.steps >= self._table_step or any(ahead):
            raise ValueError("a sequence has reached the end of its block table")
        self.steps += 1
        return self.steps

    def forced(self) -> Ints | None:
        """The ids that the next step must return, by slot, -1 for a draw; None if none changes."""
        replaying = {slot: each.forced(self.steps + 1) for slot, each in self._replaying.items()}
        if all(token is None for token in replaying.values()):
            return None
        ids = np.full(self.count, -1, np.int32)
        for slot, token in replaying.items():
            ids[slot] = -1 if token is None else token
        return ids

    def read(self, launch: Launch) -> list[SlotDraw]:
        """Wait for a launch and return the draws of the slots that were not stopped meanwhile."""
        drawn, step = launch.wait(), launch.step
        if launch.drafts:
            return self._read_drafts(launch, drawn)
        draws: list[SlotDraw] = []
        reports: list[tuple[float, _Top]] = []
        for row, (generation, token) in enumerate(zip(launch.rows, drawn["id"].tolist(), strict=False)):
            if not generation.live or token == INACTIVE:
                continue
            if token < 0:
                self.stop(generation.slot)
                draws.append(SlotDraw(generation.slot, None))
            elif step < generation.reports_from:
                draws.append(SlotDraw(generation.slot, Draw(token)))
            else:
                reports = reports or _reports(drawn)
                draws.append(SlotDraw(generation.slot, Draw(token, *reports[row])))
        return draws

    def _read_drafts(self, launch: Launch, drawn: np.ndarray[Any, Any]) -> list[SlotDraw]:
        """The same for a step with draft tokens, which are accepted as on the device."""
        draws: list[SlotDraw] = []
        tokens: list[int] = drawn["id"].tolist()
        reports: list[tuple[float, _Top]] = []
        row = 0
        for generation, draft in zip(launch.rows, launch.drafts, strict=True):
            rows, row = range(row, row + 1 + len(draft)), row + 1 + len(draft)
            generation.unread_drafts -= len(draft)
            if not generation.live:
                continue
            accepted = -1
            for at, guess in zip(rows, (*draft, None), strict=True):
                token = tokens[at]
                if token == INACTIVE:
                    break
                accepted += 1
                if token < 0:
                    self.stop(generation.slot)
                    draws.append(SlotDraw(generation.slot, None))
                    break
                if launch.step < generation.reports_from:
                    draws.append(SlotDraw(generation.slot, Draw(token)))
                else:
                    reports = reports or _reports(drawn)
                    draws.append(SlotDraw(generation.slot, Draw(token, *reports[at])))
                if token != guess or token in generation.end_ids:
                    break
            generation.advance(max(0, accepted))
        self._changed()
        return draws

    def _changed(self) -> None:
        """Derive what a step needs: only when a sequence joins or leaves."""
        self.numbers: Sequence[int] = sorted(self._generations)
        """The slots that generate: those of a step's rows."""
        self.rows = tuple(self._generations[slot] for slot in self.numbers)
        self._last_step = max((each.last_step for each in self.rows), default=-1)
        self._table_step = min((each.table_step for each in self.rows), default=_NEVER)
        self._masked = tuple(each for each in self.rows if each.mask is not None)
        self._replaying = {slot: each for slot, each in self._generations.items() if each.replay}


def _reports(drawn: np.ndarray[Any, Any]) -> list[tuple[float, _Top]]:
    """The log-probability of each row's token, and those of its alternatives."""
    counts = drawn["count"]
    ids, values = (drawn[name][:, : counts.max()].tolist() for name in ("top_ids", "top_logprobs"))
    tops = (tuple(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True))
    return [
        (logprob, top[:count])
        for logprob, top, count in zip(drawn["logprob"].tolist(), tops, counts.tolist(), strict=True)
    ]
