"""A runner that computes nothing, but records and checks the content of every KV position."""

from __future__ import annotations

import zlib

import numpy as np

from worker.cpu.slots import HostSlots
from worker.model import DraftSupport
from worker.ops import KV_BLOCK, Phase
from worker.sampling import Draw
from worker.token_masks import SlotMasks


class LedgerRunner(HostSlots):
    """A position holds all tokens up to its own, as K and V depend on them. Answers echo the prompt.

    A step reads what is before each of its positions through the block table. If a block is wrong,
    stale or handed out twice, the next draw finds other tokens than those of its sequence. The next
    batch raises `fault`, after it has overwritten the positions that it was to write; the draw of
    the sequence whose prompt begins with `unfit` fails.
    """

    def __init__(self, kv_blocks, vocab_size=100, slots=8):
        super().__init__(slots, self.compute, SlotMasks(vocab_size, (), ()))
        self.vocab_size, self.kv_blocks = vocab_size, kv_blocks
        self.batches = []
        self.fault = self.unfit = None
        self._held = {}

    @property
    def prefilled(self):
        """Prompt tokens computed so far."""
        return sum(len(batch.tokens) for batch in self.batches if batch.phase is Phase.PREFILL)

    def compute(self, batch, requests):
        fault, self.fault = self.fault, None
        tables = batch.block_tables * (len(batch.tokens) // len(batch.block_tables))
        held = []
        for token, position, table in zip(batch.tokens.tolist(), batch.positions.tolist(), tables, strict=True):
            before = self._held[_place(table, position - 1)] if position else ()
            held.append((*before, token))
            self._held[_place(table, position)] = ("scribble",) if fault else held[-1]
        if fault:
            raise fault
        self.batches.append(batch)
        for row, request in zip(batch.logit_rows, requests, strict=True):
            assert held[row] == (*request.prompt, *request.generated)
        rows = zip(requests, batch.logit_rows, strict=True)
        return [
            self.draw(request, held[row]) if request.forced is None else Draw(request.forced) for request, row in rows
        ]

    def draw(self, request, tokens):
        """The draw after the tokens that were read from the KV blocks."""
        if request.prompt[0] == self.unfit:
            return None
        return Draw(request.prompt[request.index % len(request.prompt)])


class DigestRunner(LedgerRunner):
    """A ledger whose draws depend on all tokens that it read from the KV blocks.

    Draft tokens cost nothing, so they are always verified.
    """

    lookahead = 0

    def __init__(self, kv_blocks, vocab_size=100, slots=8):
        super().__init__(kv_blocks, vocab_size, slots)
        self.drafts = DraftSupport(self.lookahead, dict.fromkeys((1, 2, 4, 8), 1.0), 0.0)

    def draw(self, request, tokens):
        return None if request.prompt[0] == self.unfit else Draw(next_id(tokens, self.vocab_size))


class LookaheadRunner(DigestRunner):
    """Computes one decode step ahead, as a GPU does: through the tables that the slots have then.

    First draws beside draws of other sequences are left to `first_draws`.
    """

    lookahead = 1
    step_wait = None

    def __init__(self, kv_blocks, vocab_size=100, slots=8):
        super().__init__(kv_blocks, vocab_size, slots)
        self._ahead, self._first = [], []

    def run(self, chunks, on_launched):
        draws = self.first_draws() + self._ahead
        self._first = [draw for chunk in chunks for draw in self._prefill(chunk)]
        self._ahead = self._decode(self._generating.copy()) if self._generating else []
        on_launched()
        return draws or self.first_draws()

    def first_draws(self):
        draws, self._first = self._first, []
        return draws

    def stop(self, slot):
        super().stop(slot)
        self._ahead, self._first = ([d for d in draws if d.slot != slot] for draws in (self._ahead, self._first))

    def reset(self):
        super().reset()
        self._ahead, self._first = [], []


def digest(tokens):
    """A number that depends on all tokens."""
    return zlib.crc32(np.asarray(tokens, np.int32).tobytes())


def next_id(tokens, vocab_size):
    """An id that depends on all tokens; in three of four cases it repeats the fifth-newest one."""
    number = digest(tokens)
    return tokens[-5] if number % 4 and len(tokens) > 4 else number // 4 % vocab_size


def alone(prompt, max_tokens, end_ids=frozenset(), vocab_size=100):
    """The ids that `DigestRunner` draws for a sequence that runs alone."""
    ids = []
    while len(ids) < max_tokens and not (ids and ids[-1] in end_ids):
        ids.append(next_id((*prompt, *ids), vocab_size))
    return ids


def _place(table, position):
    return int(table[position // KV_BLOCK]), position % KV_BLOCK
