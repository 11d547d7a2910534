"""The step: choose a batch, run it, commit what it drew. Everything that changes, changes in the commit.

So a step that raises has happened not at all and may be repeated. One thread owns an engine. Knows nothing of asyncio,
text, jobs or devices; the runner (`worker/model.py`) computes. Next: `sequence.py`, `batches.py`, `kv_blocks.py`.
"""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from worker.engine.batches import decode_batch, prefill_batch
from worker.engine.kv_blocks import KvBlocks, blocks_for
from worker.engine.prefix_index import whole_blocks
from worker.engine.sequence import FinishReason, Sequence
from worker.errors import InvalidRequest, VramOom
from worker.model import OnLaunched, Runner
from worker.ops import KV_BLOCK, Batch, Ints, Phase
from worker.sampling import Draw


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How the engine cuts its work."""

    context: int
    """Longest sequence, prompt and answer together, in tokens."""
    prefill_chunk: int = 64
    """Prompt tokens a step, a multiple of B: how long a cancellation waits. Bits don't depend on it."""
    max_running: int = 1
    """Sequences that own KV blocks at once; the others wait."""
    prefix_cache: bool = True
    """Whether a prompt's beginning is read from KV blocks that an earlier prompt wrote. Bits don't depend on it."""


@dataclass(frozen=True, slots=True)
class Token:
    """One drawn token of a sequence; `finish` on its last. `replayed` ones were published before."""

    sequence_id: str
    index: int
    draw: Draw
    replayed: bool
    finish: FinishReason | None


Ids: TypeAlias = npt.NDArray[np.uint32] | npt.NDArray[np.int64]


class _Reserved(NamedTuple):
    """What is kept of a prompt for a sequence that is to come."""

    prompt: list[int]
    ids: Ids
    contents: list[bytes]
    table: Ints


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
        self._reserved: dict[str, _Reserved] = {}

    @property
    def context(self) -> int:
        """Longest sequence that can run: the setting's or the KV pool's."""
        return min(self.settings.context, self._blocks.count * KV_BLOCK)

    @property
    def kv_blocks(self) -> dict[str, int]:
        """How many KV blocks are used, cached and free."""
        return self._blocks.states

    @property
    def free_kv_blocks(self) -> int:
        """KV blocks that no sequence reads: a new one may have them all."""
        return self._blocks.count - self._blocks.states["used"]

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
        reserved = self._reserved.get(sequence.id)
        known = reserved if reserved is not None and reserved.prompt == sequence.prompt else None
        ids = _array(sequence.prompt) if known is None else known.ids
        for some in (ids, _array(sequence.replay)):
            if some.size and (some.min() < 0 or some.max() >= self._runner.vocab_size):
                raise InvalidRequest.of(("prompt_tokens", f"ids must be 0 to {self._runner.vocab_size - 1}", None))
        sequence.contents = self._contents(ids) if known is None else known.contents
        self._waiting.append(sequence)

    def reserve(self, sequence_id: str, prompt: list[int]) -> int:
        """Keep what is cached of a prompt's beginning for the sequence of this id; how many tokens it will not compute.

        Kept until the sequence starts or is aborted. Only if another that came before it could never start otherwise is
        the reservation given up.
        """
        self._unreserve(sequence_id)
        ids = _array(prompt)
        contents = self._contents(ids)
        prefix = self._find(prompt, contents)
        table = self._blocks.take(len(prefix), prefix)
        assert table is not None, "nothing but what was found is taken"
        self._reserved[sequence_id] = _Reserved(prompt, ids, contents, table)
        return len(prefix) * KV_BLOCK

    def abort(self, sequence_id: str) -> None:
        """Forget a sequence, or what is reserved for it, and free its blocks; harmless if there is none."""
        self._unreserve(sequence_id)
        self._waiting = deque(s for s in self._waiting if s.id != sequence_id)
        for sequence in [s for s in self._running if s.id == sequence_id]:
            self._release(sequence)

    def step(self, on_launched: OnLaunched = lambda: None) -> list[Token]:
        """Compute one prefill chunk, or one token of every running sequence. Raises what the runner raises.

        `on_launched` is the runner's to call, as `Runner.run` says.
        """
        self._admit()
        if not self._running:
            return []
        members = [s for s in self._running if s.in_prefill][:1] or list(self._running)
        first = members[0]
        batch = prefill_batch(first, self.settings.prefill_chunk) if first.in_prefill else decode_batch(members)
        drawing = members if len(batch.logit_rows) else []
        draws = self._run(batch, drawing, on_launched)
        if batch.phase is Phase.PREFILL:
            self._advance(first, len(batch.tokens))
        return [self._commit(sequence, draw) for sequence, draw in zip(drawing, draws, strict=True)]

    def _admit(self) -> None:
        """Start waiting sequences, in order, while slots and blocks last.

        A sequence owns all its blocks from its start: it can't run out of them half-way and its table never changes.
        """
        while self._waiting and len(self._running) < self.settings.max_running:
            first = self._waiting[0]
            reserved = self._reserved.get(first.id)
            if reserved is not None and reserved.contents is first.contents:
                prefix = reserved.table.tolist()  # no more than was promised, though others may have cached more since
            else:
                prefix = self._find(first.prompt, first.contents)
            table = self._blocks.take(blocks_for(len(first.prompt) + first.max_tokens), prefix)
            if table is not None:
                self._unreserve(first.id)
                first.block_table, first.prefilled = table, len(prefix) * KV_BLOCK
                first.place = self._blocks.place(prefix)
                self._running.append(self._waiting.popleft())
            elif self._running:
                return
            else:  # only reservations are in its way, and what they wait for may be behind it
                self._unreserve(*(self._reserved.keys() - {first.id}))

    def _run(self, batch: Batch, drawing: list[Sequence], on_launched: OnLaunched) -> list[Draw]:
        """The batch's draws. A fault that leaves doubt about what the device holds empties the prefix cache."""
        try:
            return self._runner.run(batch, [s.next_draw() for s in drawing], on_launched)
        except (VramOom, MemoryError):
            raise  # what could be launched wrote to blocks that nobody can find
        except Exception:
            self._unreserve(*self._reserved)
            self._blocks.forget()
            for sequence in self._running:
                sequence.contents = []
            raise

    def _advance(self, sequence: Sequence, computed: int) -> None:
        """Count prompt tokens as computed; the blocks that they complete can be found from now on."""
        first = sequence.prefilled // KV_BLOCK
        sequence.prefilled += computed
        whole = slice(first, sequence.prefilled // KV_BLOCK)
        assert sequence.block_table is not None, "a running sequence owns its blocks"
        for block, content in zip(sequence.block_table[whole].tolist(), sequence.contents[whole], strict=False):
            sequence.place = self._blocks.keep(block, content, sequence.place)

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

    def _contents(self, ids: Ids) -> list[bytes]:
        return whole_blocks(ids) if self.settings.prefix_cache else []

    def _find(self, prompt: list[int], contents: list[bytes]) -> list[int]:
        """The cached blocks that a prompt begins with; its last token is always computed, for there its logits are."""
        return self._blocks.find(contents[: (len(prompt) - 1) // KV_BLOCK])

    def _unreserve(self, *sequence_ids: str) -> None:
        for each in sequence_ids:
            reserved = self._reserved.pop(each, None)
            if reserved is not None:
                self._blocks.give_back(reserved.table)


def _array(ids: list[int]) -> Ids:
    """The ids, unsigned where all of them can be, as an `array` is made of a list in a third of NumPy's time."""
    try:
        return np.frombuffer(array("I", ids), np.uint32)
    except OverflowError:  # which no vocabulary has
        return np.array(ids, np.int64)
