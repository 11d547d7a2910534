"""From sequences to the batch of one step. Reads them and changes nothing; `engine.py` chooses which."""

from __future__ import annotations

import numpy as np

from worker.engine.sequence import Sequence
from worker.ops import KV_BLOCK, Batch, Ints, Phase

_LONG = 32_768
"""Tokens before a prompt's chunk from which on attention to them is most of its work."""
_LEAST = 128
_NO_ROWS = np.empty(0, np.int32)


def prefill_batch(sequence: Sequence, chunk: int) -> Batch:
    """The next `chunk` prompt tokens, fewer far in; the last chunk asks for the logits of its last row."""
    start = sequence.prefilled
    stop = min(start + chunk_after(start, chunk), len(sequence.prompt))
    rows = np.array([stop - start - 1], np.int32) if stop == len(sequence.prompt) else _NO_ROWS
    tokens = np.array(sequence.prompt[start:stop], np.int32)
    return Batch(Phase.PREFILL, tokens, np.arange(start, stop, dtype=np.int32), (_table(sequence),), rows)


def chunk_after(prefilled: int, chunk: int) -> int:
    """Tokens of a step after `prefilled` others: half as many each time what they attend to has doubled.

    So attention takes no longer late in a long prompt than early, and a cancellation waits no longer.
    """
    while prefilled >= _LONG and chunk >= 2 * _LEAST:
        prefilled, chunk = prefilled // 2, chunk // 2 // KV_BLOCK * KV_BLOCK
    return chunk


def decode_batch(sequences: list[Sequence]) -> Batch:
    """The newest token of every sequence."""
    tokens = np.array([s.generated[-1] for s in sequences], np.int32)
    positions = np.array([len(s.prompt) + len(s.generated) - 1 for s in sequences], np.int32)
    tables = tuple(_table(s) for s in sequences)
    return Batch(Phase.DECODE, tokens, positions, tables, np.arange(len(sequences), dtype=np.int32))


def _table(sequence: Sequence) -> Ints:
    assert sequence.block_table is not None, "a running sequence owns its blocks"
    return sequence.block_table
