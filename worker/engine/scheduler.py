"""The scheduler: which sequences own slots and KV blocks, and the chunks of the next step.

A sequence is paused or waiting, then running: it has a slot, computes its prompt in chunks and
then generates. It holds the cached blocks of its prompt's beginning from `add` on. If one sequence
runs at a time, it gets all its other blocks when it starts. Otherwise it starts with those of its
known tokens and one more, and its table grows; when no block is free, the youngest sequence of the
least urgent priority waits again and is computed anew (preemption by recomputation, as in vLLM:
Kwon et al. 2023, arXiv:2309.06180). Read first: `sequence.py`, `waiting.py`.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from worker.engine.kv_blocks import KvBlocks, blocks_for
from worker.engine.sequence import NO_SLOT, Sequence
from worker.engine.waiting import WaitingSequences, urgency
from worker.model import Chunk, SlotStart
from worker.ops import KV_BLOCK, Ints

_TOKEN_WORK = 1 << 13
"""Pairs of a query and a key whose attention takes as long as the products of a token."""
_STEP_WORK = 5 << 23
"""Most work of a step's chunks in such pairs, so that an abort need not wait longer for attention:
that of the first 4,096 tokens of a prompt."""
_MIN_CHUNK = 128
_LEAST_FURTHER = 64
"""Tokens of a chunk after the first one of a step, unless they end a prompt. With fewer, a prompt
would only begin, and then wait behind those that have not."""
_BESIDE_ROW = 2
"""Prompt tokens a step for each sequence that generates, if that is more than `prefill_beside`:
their step takes longer, and their successors' prompts must be computed while they generate."""
_GROWTH = 8
"""Blocks by which a table grows, if so many are free: each growth is an upload."""
_UNBOUNDED = 1 << 60


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Sizes of the engine's steps."""

    context: int
    """Longest sequence, prompt and answer together, in tokens."""
    prefill_chunk: int = 64
    """Prompt tokens a step, a multiple of B: bounds an abort's wait. Bits do not depend on it."""
    max_running: int = 1
    """Sequences that run at once; the others wait."""
    prefix_cache: bool = True
    """Whether prompts share the KV blocks of equal beginnings. Bits do not depend on it."""
    prefill_beside: int = 128
    """Prompt tokens of a step in which up to 64 other sequences generate, a multiple of B: bounds
    the time between two tokens. At most `prefill_chunk` counts. Bits do not depend on it."""
    speculation: Literal["off", "ngram"] = "off"
    """Whether decode steps verify tokens of a repeated text. Bits do not depend on it."""


class Step(NamedTuple):
    """What the runner does in one step, besides a decode step of the slots that generate."""

    chunks: tuple[Chunk, ...] = ()
    prompts: tuple[Sequence, ...] = ()
    """The sequence of each chunk."""
    stopped: tuple[int, ...] = ()
    """Slots of preempted sequences."""
    extended: tuple[Sequence, ...] = ()
    """Generating sequences whose tables have grown."""


_DECODE_ONLY = Step()


class Scheduler:
    """Admits waiting sequences, and advances those that run together.

    K and V of draft tokens are at most `draft_margin` tokens ahead of those of the tokens that
    a decode step without them computes.
    """

    def __init__(self, blocks: KvBlocks, settings: EngineSettings, draft_margin: int = 0) -> None:
        for size in (settings.prefill_chunk, settings.prefill_beside):
            if size % KV_BLOCK or size <= 0:
                raise ValueError(f"a chunk of {size} tokens is not a positive multiple of {KV_BLOCK}")
        self.slots: list[Sequence | None] = [None] * settings.max_running
        """The running sequence in each slot."""
        self.short: list[Sequence] = []
        """Generating sequences whose tables must grow before the next step."""
        self.preemptions = 0
        """Preemptions since the start."""
        self._settings = settings
        self._blocks = blocks
        self._grows = settings.max_running > 1
        self._draft_margin = draft_margin
        self._paused: dict[str, Sequence] = {}
        self._waiting = WaitingSequences()
        self._running: dict[Sequence, None] = {}
        self._prefilling: list[Sequence] = []
        self._free_slots = list(range(settings.max_running))
        self._arrivals = self._step = 0

    @property
    def active(self) -> list[str]:
        """The ids of all sequences that wait or run."""
        return [s.id for s in (*self._waiting, *self._running)]

    @property
    def idle(self) -> bool:
        """Whether no sequence waits or runs; paused ones do not count."""
        return not self._running and not self._waiting

    @property
    def running(self) -> int:
        """Number of running sequences."""
        return len(self._running)

    @property
    def has_room(self) -> bool:
        """Whether an added sequence may start in the next step, which has no chunk yet."""
        return bool(self._free_slots and self._running) and not (self._waiting or self._prefilling)

    @property
    def generating(self) -> list[Sequence]:
        """The running sequences whose prompts are computed, by slot."""
        return [each for each in self.slots if each and each.prefilled == len(each.prompt)]

    @property
    def waiting(self) -> int:
        """Number of waiting sequences; paused ones do not count."""
        return len(self._waiting)

    def add(self, sequence: Sequence, *, paused: bool) -> int:
        """Hold the cached prefix and queue or pause the sequence; returns the cached tokens."""
        sequence.reusable = _reusable(sequence)
        self._hold_prefix(sequence)
        if paused:
            self._paused[sequence.id] = sequence
        else:
            self._queue(sequence)
        return sequence.prefilled

    def resume(self, sequence: Sequence) -> None:
        """Queue `sequence` in place of the paused one with its id, whose held blocks it takes over.

        Raises ValueError if there is none, or one with another prompt.
        """
        paused = self._paused.get(sequence.id)
        if paused is None or paused.prompt != sequence.prompt:
            raise ValueError(f"no paused sequence {sequence.id} with this prompt")
        del self._paused[sequence.id]
        sequence.ids, sequence.full_blocks, sequence.reusable = paused.ids, paused.full_blocks, paused.reusable
        sequence.block_table, sequence.prefix_node = paused.block_table, paused.prefix_node
        sequence.prefilled = paused.prefilled
        self._queue(sequence)

    def remove(self, sequence_id: str) -> int:
        """Remove a sequence in any state and release its blocks; returns its slot or NO_SLOT."""
        for sequence in (*self._paused.values(), *self._waiting, *self._running):
            if sequence.id == sequence_id:
                self._paused.pop(sequence_id, None)
                self._waiting.discard(sequence)
                return self.finish(sequence)
        return NO_SLOT

    def finish(self, sequence: Sequence) -> int:
        """Release a sequence's blocks and its slot, which is returned; NO_SLOT if it had none."""
        slot = sequence.slot
        if slot != NO_SLOT:
            del self._running[sequence]
            if sequence in self._prefilling:
                self._prefilling.remove(sequence)
            self.slots[slot], sequence.slot = None, NO_SLOT
            heapq.heappush(self._free_slots, slot)
        self._release((sequence,))
        return slot

    def schedule(self) -> Step | None:
        """The next step, or None if no sequence can run.

        Tables that are too short grow, waiting sequences start while slots and blocks are free, and
        prompts get chunks within the prefill budget.
        """
        self._step += 1
        if not (self.short or self._waiting or self._prefilling):
            return _DECODE_ONLY if self._running else None
        stopped, extended = self._grow()
        self._admit()
        if not self._running:
            return None
        prompts, chunks = self._chunks()
        return Step(chunks, prompts, stopped, extended)

    def computed(self, step: Step) -> None:
        """Count the step's prompt tokens as computed, and cache the blocks that they fill."""
        for sequence, chunk in zip(step.prompts, step.chunks, strict=True):
            first = sequence.prefilled // KV_BLOCK
            sequence.prefilled += len(chunk.tokens)
            filled = slice(first, sequence.prefilled // KV_BLOCK)
            blocks = _table(sequence)[filled].tolist()
            for block, content in zip(blocks, sequence.full_blocks[filled], strict=False):
                sequence.prefix_node = self._blocks.cache(block, content, sequence.prefix_node)
            if chunk.begin is not None:
                self._prefilling.remove(sequence)

    def restart(self) -> None:
        """Queue all running sequences again, after a step that failed and a reset of the runner."""
        for sequence in list(self._running):
            self._requeue(sequence)
        self.short.clear()

    def clear_cache(self) -> None:
        """Empty the prefix cache. Running sequences add nothing to it any more."""
        self._release((*self._paused.values(), *self._waiting))
        self._blocks.clear_cache()
        for sequence in self._running:
            sequence.full_blocks = []

    def _queue(self, sequence: Sequence) -> None:
        self._arrivals += 1
        sequence.arrival, sequence.queued_at = self._arrivals, self._step
        self._waiting.add(sequence)

    def _grow(self) -> tuple[tuple[int, ...], tuple[Sequence, ...]]:
        """Extend the tables that are too short: the stopped slots and the extended sequences.

        When no block is free, prefixes held for others are given up, then the youngest sequence of
        the lowest priority is preempted, which may be the one whose table is short.
        """
        stopped: list[int] = []
        extended: list[Sequence] = []
        for sequence in sorted(self.short, key=_rank):
            while sequence.slot != NO_SLOT:
                if self._extend(sequence):
                    extended.append(sequence)
                    break
                if not self._release((*self._paused.values(), *self._waiting)):
                    victim = max(self._running, key=_rank)
                    stopped.append(victim.slot)
                    self._requeue(victim)
                    self.preemptions += 1
        self.short.clear()
        return tuple(stopped), tuple(extended)

    def _extend(self, sequence: Sequence) -> bool:
        """Extend a table by _GROWTH blocks or by one; returns whether a block was free."""
        table = _table(sequence)
        full = _all_blocks(sequence)
        for count in (min(len(table) + _GROWTH, full), len(table) + 1):
            longer = self._blocks.extend(table, count)
            if longer is not None:
                sequence.block_table = longer
                sequence.room += (count - len(table)) * KV_BLOCK if count < full else _UNBOUNDED
                return True
        return False

    def _admit(self) -> None:
        """Start waiting sequences while slots and KV blocks are free."""
        while self._waiting and self._free_slots:
            first = self._waiting.first(self._step)
            if first.block_table is None:  # its hold was given up
                self._hold_prefix(first)
            if self._start(first):
                self._waiting.start(first)
            elif self._running:
                return
            else:
                # Only prefixes held for others are in the way, and those may wait for this one.
                self._release((*self._paused.values(), *(s for s in self._waiting if s is not first)))

    def _start(self, sequence: Sequence) -> bool:
        """Give a sequence a slot and blocks; returns whether enough blocks are free."""
        full, count = _all_blocks(sequence), blocks_for(len(sequence.prompt) + len(sequence.known)) + 1
        if count >= full or not self._grows:
            count = full
        # A block is left to each running sequence, whose growth would preempt this one.
        table = self._blocks.extend(_table(sequence), count, leave=len(self._running) if self._grows else 0)
        if table is None:
            return False
        sequence.block_table, sequence.preempted = table, False
        sequence.recomputed = len(sequence.generated)
        room = count * KV_BLOCK - len(sequence.prompt) - self._draft_margin
        sequence.room = room if count < full else _UNBOUNDED
        sequence.slot = heapq.heappop(self._free_slots)
        self.slots[sequence.slot] = sequence
        self._running[sequence] = None
        self._prefilling.append(sequence)
        return True

    def _chunks(self) -> tuple[tuple[Sequence, ...], tuple[Chunk, ...]]:
        """The chunks of the step and their prompts, within its budget of tokens and of work.

        The most urgent prompts come first, of those the ones whose last chunk is longest ago. The
        runner computes the chunks together, each in rows of whole KV blocks: those count.
        """
        budget, work = self._settings.prefill_chunk, _STEP_WORK
        generating = len(self._running) - len(self._prefilling)
        if generating:
            by_rows = _BESIDE_ROW * generating // KV_BLOCK * KV_BLOCK
            budget = min(budget, max(self._settings.prefill_beside, by_rows))
        prompts: list[Sequence] = []
        chunks: list[Chunk] = []
        for sequence in sorted(self._prefilling, key=lambda s: (urgency(s, self._step), s.chunk_at, s.arrival)):
            left = len(sequence.prompt) - sequence.prefilled
            size = chunk_after(sequence.prefilled, budget, work)
            if chunks and (size < min(left, _LEAST_FURTHER) or _work(sequence.prefilled, min(size, left)) > work):
                continue
            chunk = _next_chunk(sequence, size)
            sequence.chunk_at = self._step
            prompts.append(sequence)
            chunks.append(chunk)
            budget -= blocks_for(len(chunk.tokens)) * KV_BLOCK
            work -= _work(sequence.prefilled, len(chunk.tokens))
            if not budget:
                break
        return tuple(prompts), tuple(chunks)

    def _requeue(self, sequence: Sequence) -> None:
        """Let a running sequence wait for another start, before others of its priority."""
        self.finish(sequence)
        sequence.preempted = True
        sequence.prefilled, sequence.reusable = 0, _reusable(sequence)
        self._waiting.add(sequence)

    def _hold_prefix(self, sequence: Sequence) -> None:
        reusable = sequence.full_blocks[: sequence.reusable]
        sequence.block_table, sequence.prefix_node = self._blocks.hold_prefix(reusable)
        sequence.reusable = len(sequence.block_table)  # `add` returns it: a later hold is not longer
        sequence.prefilled = len(sequence.block_table) * KV_BLOCK

    def _release(self, sequences: Iterable[Sequence]) -> bool:
        """Release the blocks that sequences hold; returns whether they held any."""
        held = False
        for sequence in sequences:
            if sequence.block_table is not None and len(sequence.block_table):
                self._blocks.release(sequence.block_table)
                sequence.block_table, held = None, True
        return held


def chunk_after(prefilled: int, chunk: int, work: int = _STEP_WORK) -> int:
    """Tokens of the chunk after `prefilled` tokens: `chunk`, halved until its work is in `work`.

    Attention then takes no longer late in a long prompt than early, and an abort waits no longer.
    """
    while _work(prefilled, chunk) > work and chunk >= 2 * _MIN_CHUNK:
        chunk = chunk // 2 // KV_BLOCK * KV_BLOCK
    return chunk


def _work(prefilled: int, tokens: int) -> int:
    """Work of a chunk after `prefilled` tokens."""
    return tokens * (_TOKEN_WORK + prefilled + tokens // 2)


def _next_chunk(sequence: Sequence, size: int) -> Chunk:
    """The next `size` tokens of the prompt, a multiple of B, or those that are left."""
    start, length = sequence.prefilled, len(sequence.prompt)
    stop, begin = start + size, None
    if stop >= length:
        stop, begin = length, _slot_start(sequence)
    return Chunk(sequence.ids[start:stop], start, _table(sequence), begin)


def _slot_start(sequence: Sequence) -> SlotStart:
    return SlotStart(
        sequence.slot,
        sequence.prompt,
        sequence.sampling,
        sequence.ends,
        sequence.max_tokens,
        tuple(sequence.known),
    )


def _rank(sequence: Sequence) -> tuple[int, int]:
    """Order in which running sequences keep their blocks: by priority, then by age."""
    return sequence.priority, sequence.arrival


def _reusable(sequence: Sequence) -> int:
    """Full blocks before the last prompt token, whose logits the first draw needs."""
    return (len(sequence.prompt) - 1) // KV_BLOCK


def _all_blocks(sequence: Sequence) -> int:
    return blocks_for(len(sequence.prompt) + sequence.max_tokens)


def _table(sequence: Sequence) -> Ints:
    assert sequence.block_table is not None, f"sequence {sequence.id} holds no blocks"
    return sequence.block_table
