"""A runner that computes nothing, but records and checks the content of every KV slot."""

from __future__ import annotations

from worker.ops import KV_BLOCK, Phase
from worker.sampling import Draw


class LedgerRunner:
    """A slot holds all tokens up to its own, as K and V depend on them. Answers echo the prompt.

    A step reads the slot before each of its positions through the block table. If a block is wrong,
    stale or handed out twice, the next draw finds other tokens than those of its sequence. The next
    step raises `fault`, after it has overwritten the slots that it was to write.
    """

    def __init__(self, kv_blocks, vocab_size=100):
        self.vocab_size, self.kv_blocks = vocab_size, kv_blocks
        self.batches = []
        self.fault = None
        self._slots = {}

    @property
    def prefilled(self):
        """Prompt tokens computed so far."""
        return sum(len(batch.tokens) for batch in self.batches if batch.phase is Phase.PREFILL)

    def run(self, batch, requests, on_launched):
        fault, self.fault = self.fault, None
        tables = batch.block_tables * (len(batch.tokens) // len(batch.block_tables))
        held = []
        for token, position, table in zip(batch.tokens.tolist(), batch.positions.tolist(), tables, strict=True):
            before = self._slots[_slot(table, position - 1)] if position else ()
            held.append((*before, token))
            self._slots[_slot(table, position)] = ("scribble",) if fault else held[-1]
        if fault:
            raise fault
        self.batches.append(batch)
        for row, request in zip(batch.logit_rows, requests, strict=True):
            assert held[row] == (*request.prompt, *request.generated)
        return [Draw(r.prompt[r.index % len(r.prompt)] if r.forced is None else r.forced) for r in requests]


def _slot(table, position):
    return int(table[position // KV_BLOCK]), position % KV_BLOCK
