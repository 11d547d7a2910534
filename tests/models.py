"""Runners and engines over a model file, for tests that look below `worker/runtime.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from worker.adapters import bind
from worker.adapters.hparams import read_hparams
from worker.cpu.backend import uploader
from worker.cpu.runner import CpuRunner
from worker.engine import DrawnToken, Engine, EngineSettings, Sequence
from worker.engine.kv_blocks import KvBlocks, blocks_for
from worker.gguf_file import GgufFile
from worker.model import ModelOptions
from worker.ops import KV_BLOCK, Batch, Phase
from worker.sampling import Sampling

GREEDY = Sampling(temperature=0)


def cpu_runner(path: Path, *, context: int = 512, sliding_window: Any = "auto", **kwargs: Any) -> CpuRunner:
    """The model of a file on the CPU, with a KV pool of one context."""
    with GgufFile.open(path) as file:
        with uploader(file) as upload:
            model, _ = bind(file, ModelOptions(context, sliding_window), upload)
        hp = read_hparams(file)
    return CpuRunner(model, hp, **{"kv_blocks": blocks_for(context), **kwargs})


def prefill(
    prompt: list[int], start: int = 0, *, rows: list[int] | None = None, table: np.ndarray | None = None
) -> Batch:
    """A prefill batch of `prompt[start:]`; every row's logits are wanted unless `rows` says which."""
    positions = np.arange(start, len(prompt), dtype=np.int32)
    table = np.arange(blocks_for(len(prompt) + KV_BLOCK), dtype=np.int32) if table is None else table
    wanted = np.arange(len(positions), dtype=np.int32) if rows is None else np.array(rows, np.int32)
    return Batch(Phase.PREFILL, np.array(prompt[start:], np.int32), positions, (table,), wanted)


def decode(token: int, position: int, table: np.ndarray) -> Batch:
    """A decode batch of one token."""
    one = np.zeros(1, np.int32)
    return Batch(Phase.DECODE, one + token, one + position, (table,), one)


def engine_of(
    runner: Any, *, context: int = 512, chunk: int = 64, running: int = 1, order: Any = None, prefix_cache: bool = True
) -> Engine:
    """An engine over a runner; `order` is the order in which KV blocks are handed out."""
    blocks = None if order is None else KvBlocks(len(order), np.asarray(order, np.int32))
    return Engine(runner, EngineSettings(context, chunk, running, prefix_cache), blocks)


def run(engine: Engine, *sequences: Sequence) -> dict[str, list[DrawnToken]]:
    """Run sequences to their ends: their tokens by sequence id."""
    for sequence in sequences:
        engine.add(sequence)
    tokens: dict[str, list[DrawnToken]] = {s.id: [] for s in sequences}
    while not engine.idle:
        for token in engine.step():
            tokens[token.sequence_id].append(token)
    return tokens


def ids(tokens: list[DrawnToken]) -> list[int]:
    """The drawn ids."""
    return [token.draw.id for token in tokens]
