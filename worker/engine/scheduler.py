"""Sequences, and the scheduler: which of them own KV blocks, and the batch of the next step.

A sequence is paused or waiting, then running. It holds the cached blocks of its prompt's beginning
from `add` on, and gets all its other blocks when it starts, so that it cannot run out of them and
its block table never changes.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from worker.engine.kv_blocks import ROOT, KvBlocks, blocks_for
from worker.ops import KV_BLOCK, Batch, Ints, Phase
from worker.sampling import DrawRequest, EngineFinishReason, Sampling

_LONG_CONTEXT = 32_768
"""Tokens before a prompt's chunk from which on attention to them dominates the chunk's time."""
_MIN_CHUNK = 128


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


@dataclass(slots=True)
class Sequence:
    """A prompt to be continued by at most `max_tokens` tokens, ended by any of `end_ids`.

    `replay` holds tokens that an earlier attempt published. The decode path computes them without
    drawing, and the first new token has the index len(replay). The scheduler and the engine write
    the remaining fields.
    """

    id: str
    prompt: list[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    end_ids: frozenset[int] = frozenset()
    replay: list[int] = field(default_factory=list)

    generated: list[int] = field(default_factory=list, init=False)
    prefilled: int = field(default=0, init=False)
    """Prompt tokens whose K and V are in `block_table`: computed, or found in the prefix cache."""
    full_blocks: list[bytes] = field(default_factory=list, init=False)
    """The ids of the prompt's full blocks; empty if none of them may enter the prefix cache."""
    prefix_node: int = field(default=ROOT, init=False)
    """The node of the prefix index that stands for the full blocks up to `prefilled`."""
    block_table: Ints | None = field(default=None, init=False)
    """Before the start the blocks of the cached prefix, from the start all blocks of the sequence;
    None where no block is held."""

    @property
    def in_prefill(self) -> bool:
        """Whether prompt tokens are left to compute."""
        return self.prefilled < len(self.prompt)

    def next_draw(self) -> DrawRequest:
        """The request for the token of index len(generated)."""
        index = len(self.generated)
        forced = self.replay[index] if index < len(self.replay) else None
        return DrawRequest(self.sampling, index, self.prompt, self.generated, forced)

    def finish_at(self, index: int, token: int) -> EngineFinishReason | None:
        """Why the sequence ends with `token` at index `index`, or None if it continues."""
        ends = frozenset[int]() if self.sampling.ignore_eos else self.end_ids
        if token in ends or token in self.sampling.stop_token_ids:
            return "stop"
        return "length" if index + 1 >= self.max_tokens else None


class Scheduler:
    """Admits sequences in the order of `add` and `resume`, and advances those that run together."""

    def __init__(self, blocks: KvBlocks, settings: EngineSettings) -> None:
        if settings.prefill_chunk % KV_BLOCK or settings.prefill_chunk <= 0:
            raise ValueError(f"prefill_chunk {settings.prefill_chunk} is not a positive multiple of {KV_BLOCK}")
        self._settings = settings
        self._blocks = blocks
        self._paused: dict[str, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def active(self) -> list[str]:
        """The ids of all sequences that wait or run."""
        return [s.id for s in (*self._waiting, *self._running)]

    @property
    def idle(self) -> bool:
        """Whether no sequence waits or runs; paused ones do not count."""
        return not self._waiting and not self._running

    def add(self, sequence: Sequence, *, paused: bool) -> int:
        """Hold the cached prefix and queue or pause the sequence; returns the cached tokens."""
        # The last prompt token is always computed: the first draw needs its logits.
        self._hold_prefix(sequence, (len(sequence.prompt) - 1) // KV_BLOCK)
        if paused:
            self._paused[sequence.id] = sequence
        else:
            self._waiting.append(sequence)
        return sequence.prefilled

    def resume(self, sequence: Sequence) -> None:
        """Queue `sequence` in place of the paused one with its id, whose held blocks it takes over.

        Raises ValueError if there is none, or one with another prompt.
        """
        paused = self._paused.get(sequence.id)
        if paused is None or paused.prompt != sequence.prompt:
            raise ValueError(f"no paused sequence {sequence.id} with this prompt")
        del self._paused[sequence.id]
        sequence.full_blocks, sequence.block_table = paused.full_blocks, paused.block_table
        sequence.prefix_node, sequence.prefilled = paused.prefix_node, paused.prefilled
        self._waiting.append(sequence)

    def remove(self, sequence_id: str) -> None:
        """Remove a sequence in any state and release its blocks. Does nothing if there is none."""
        sequences = [s for s in (*self._paused.values(), *self._waiting, *self._running) if s.id == sequence_id]
        self._paused.pop(sequence_id, None)
        self._waiting = deque(s for s in self._waiting if s.id != sequence_id)
        self._running = [s for s in self._running if s.id != sequence_id]
        self._release(*sequences)

    def schedule(self) -> tuple[Batch, list[Sequence]] | None:
        """The next batch and its sequences, or None if none can run.

        A batch is one chunk of the first unfinished prompt, or one token of every running sequence.
        """
        self._admit()
        if not self._running:
            return None
        for sequence in self._running:
            if sequence.in_prefill:
                return _prefill_batch(sequence, self._settings.prefill_chunk), [sequence]
        return _decode_batch(self._running), list(self._running)

    def prefilled(self, sequence: Sequence, tokens: int) -> None:
        """Count `tokens` more prompt tokens as computed, and cache the blocks that they fill."""
        first = sequence.prefilled // KV_BLOCK
        sequence.prefilled += tokens
        filled = slice(first, sequence.prefilled // KV_BLOCK)
        blocks = _table(sequence)[filled].tolist()
        for block, content in zip(blocks, sequence.full_blocks[filled], strict=False):
            sequence.prefix_node = self._blocks.cache(block, content, sequence.prefix_node)

    def clear_cache(self) -> None:
        """Empty the prefix cache. Running sequences add nothing to it any more."""
        self._release(*self._paused.values(), *self._waiting)
        self._blocks.clear_cache()
        for sequence in self._running:
            sequence.full_blocks = []

    def _admit(self) -> None:
        """Start waiting sequences, in order, while `max_running` and the KV blocks allow."""
        while self._waiting and len(self._running) < self._settings.max_running:
            first = self._waiting[0]
            if first.block_table is None:  # its hold was given up: at most the blocks that `add` reported
                self._hold_prefix(first, first.prefilled // KV_BLOCK)
            table = self._blocks.extend(_table(first), blocks_for(len(first.prompt) + first.max_tokens))
            if table is not None:
                first.block_table = table
                self._running.append(self._waiting.popleft())
            elif self._running:
                return
            else:
                # Only prefixes held for others are in the way, and those may wait for this one.
                self._release(*self._paused.values(), *(s for s in self._waiting if s is not first))

    def _hold_prefix(self, sequence: Sequence, max_blocks: int) -> None:
        reusable = sequence.full_blocks[:max_blocks]
        sequence.block_table, sequence.prefix_node = self._blocks.hold_prefix(reusable)
        sequence.prefilled = len(sequence.block_table) * KV_BLOCK

    def _release(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            if sequence.block_table is not None and len(sequence.block_table):
                self._blocks.release(sequence.block_table)
                sequence.block_table = None


def _prefill_batch(sequence: Sequence, chunk: int) -> Batch:
    """The next chunk of the prompt; the last chunk requests the logits of its last row."""
    start = sequence.prefilled
    stop = min(start + chunk_after(start, chunk), len(sequence.prompt))
    rows = np.array([stop - start - 1], np.int32) if stop == len(sequence.prompt) else np.empty(0, np.int32)
    tokens = np.array(sequence.prompt[start:stop], np.int32)
    return Batch(Phase.PREFILL, tokens, np.arange(start, stop, dtype=np.int32), (_table(sequence),), rows)


def chunk_after(prefilled: int, chunk: int) -> int:
    """Tokens of the chunk after `prefilled` tokens: half as many each time the context doubles.

    Attention then takes no longer late in a long prompt than early, and an abort waits no longer.
    """
    while prefilled >= _LONG_CONTEXT and chunk >= 2 * _MIN_CHUNK:
        prefilled, chunk = prefilled // 2, chunk // 2 // KV_BLOCK * KV_BLOCK
    return chunk


def _decode_batch(sequences: list[Sequence]) -> Batch:
    """The newest token of every sequence."""
    tokens = np.array([s.generated[-1] for s in sequences], np.int32)
    positions = np.array([len(s.prompt) + len(s.generated) - 1 for s in sequences], np.int32)
    tables = tuple(_table(s) for s in sequences)
    return Batch(Phase.DECODE, tokens, positions, tables, np.arange(len(sequences), dtype=np.int32))


def _table(sequence: Sequence) -> Ints:
    assert sequence.block_table is not None, f"sequence {sequence.id} holds no blocks"
    return sequence.block_table
