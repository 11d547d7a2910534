"""The step: choose a batch, run it, commit what it drew. Everything that changes, changes in the commit.

So a step that raises has happened not at all and may be repeated. One thread owns an engine. Knows nothing of asyncio,
text, jobs or devices; the runner (`worker/model.py`) computes. Next: `sequence.py`, `kv_blocks.py`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from worker.engine.kv_blocks import KvBlocks, blocks_for
from worker.engine.sequence import FinishReason, Sequence
from worker.errors import InvalidRequest
from worker.model import Runner
from worker.ops import KV_BLOCK, Batch, Ints, Phase
from worker.sampling import Draw

_NO_ROWS = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How the engine cuts its work."""

    context: int
    """Longest sequence, prompt and answer together, in tokens."""
    prefill_chunk: int = 64
    """Prompt tokens a step, a multiple of B: how long a cancellation waits. Bits don't depend on it."""
    max_running: int = 1
    """Sequences that own KV blocks at once; the others wait."""


@dataclass(frozen=True, slots=True)
class Token:
    """One drawn token of a sequence; `finish` on its last. `replayed` ones were published before."""

    sequence_id: str
    index: int
    draw: Draw
    replayed: bool
    finish: FinishReason | None


class Engine:
    """`add`, `abort`, `step`: sequences wait in order, those that run advance together."""

    def __init__(self, runner: Runner, settings: EngineSettings, blocks: KvBlocks | None = None) -> None:
        if settings.prefill_chunk % KV_BLOCK or settings.prefill_chunk <= 0:
            raise ValueError(f"prefill_chunk {settings.prefill_chunk} is no positive multiple of {KV_BLOCK}")
        self.settings = settings
        self._runner = runner
        self._blocks = blocks or KvBlocks(runner.kv_blocks)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def context(self) -> int:
        """Longest sequence that can run: the setting's or the KV pool's."""
        return min(self.settings.context, self._blocks.count * KV_BLOCK)

    @property
    def free_kv_blocks(self) -> int:
        """KV blocks that no sequence owns."""
        return self._blocks.free

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing."""
        return not self._waiting and not self._running

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises InvalidRequest if it can never fit or an id is no row of the vocabulary."""
        room = self.context - len(sequence.prompt)
        if not sequence.prompt:
            raise InvalidRequest.of(("prompt", "must hold at least one token", 0))
        if not 1 <= sequence.max_tokens <= room:
            raise InvalidRequest.of(
                ("max_tokens", f"must be 1 to {room}, what the context leaves", sequence.max_tokens)
            )
        if any(not 0 <= token < self._runner.vocab_size for token in (*sequence.prompt, *sequence.replay)):
            raise InvalidRequest.of(("prompt_tokens", f"ids must be 0 to {self._runner.vocab_size - 1}", None))
        self._waiting.append(sequence)

    def abort(self, sequence_id: str) -> None:
        """Forget a sequence and free its blocks; harmless if there is none."""
        self._waiting = deque(s for s in self._waiting if s.id != sequence_id)
        for sequence in [s for s in self._running if s.id == sequence_id]:
            self._release(sequence)

    def step(self) -> list[Token]:
        """Compute one prefill chunk, or one token of every running sequence. Raises what the runner raises."""
        self._admit()
        if not self._running:
            return []
        members = [s for s in self._running if s.in_prefill][:1] or list(self._running)
        batch = (
            _prefill_batch(members[0], self.settings.prefill_chunk) if members[0].in_prefill else _decode_batch(members)
        )
        drawing = members if len(batch.logit_rows) else []
        draws = self._runner.run(batch, [s.next_draw() for s in drawing])
        if batch.phase is Phase.PREFILL:
            members[0].prefilled += len(batch.tokens)
        return [self._commit(sequence, draw) for sequence, draw in zip(drawing, draws, strict=True)]

    def _admit(self) -> None:
        """Start waiting sequences, in order, while slots and blocks last.

        A sequence owns all its blocks from its start: it can't run out of them half-way and its table never changes.
        """
        while self._waiting and len(self._running) < self.settings.max_running:
            first = self._waiting[0]
            table = self._blocks.take(blocks_for(len(first.prompt) + first.max_tokens))
            if table is None:
                return
            first.block_table = table
            self._running.append(self._waiting.popleft())

    def _commit(self, sequence: Sequence, draw: Draw) -> Token:
        index = len(sequence.generated)
        sequence.generated.append(draw.id)
        finish = sequence.finish_at(index, draw.id)
        if finish:
            self._release(sequence)
        return Token(sequence.id, index, draw, index < len(sequence.replay), finish)

    def _release(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        if sequence.block_table is not None:
            self._blocks.give_back(sequence.block_table)
            sequence.block_table = None


def _prefill_batch(sequence: Sequence, chunk: int) -> Batch:
    """The next `chunk` prompt tokens; the last chunk asks for the logits of its last row."""
    start = sequence.prefilled
    stop = min(start + chunk, len(sequence.prompt))
    rows = np.array([stop - start - 1], np.int32) if stop == len(sequence.prompt) else _NO_ROWS
    tokens = np.array(sequence.prompt[start:stop], np.int32)
    return Batch(Phase.PREFILL, tokens, np.arange(start, stop, dtype=np.int32), (_table(sequence),), rows)


def _decode_batch(sequences: list[Sequence]) -> Batch:
    """The newest token of every sequence."""
    tokens = np.array([s.generated[-1] for s in sequences], np.int32)
    positions = np.array([len(s.prompt) + len(s.generated) - 1 for s in sequences], np.int32)
    tables = tuple(_table(s) for s in sequences)
    return Batch(Phase.DECODE, tokens, positions, tables, np.arange(len(sequences), dtype=np.int32))


def _table(sequence: Sequence) -> Ints:
    assert sequence.block_table is not None, "a running sequence owns its blocks"
    return sequence.block_table
