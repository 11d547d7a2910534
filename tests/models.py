"""Runners and engines over a model file, for tests of the layers below `worker/runtime.py`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from worker.adapters import bind
from worker.adapters.hparams import read_hparams
from worker.cpu.backend import uploader
from worker.cpu.kv_cache import KvCache
from worker.cpu.runner import CpuRunner
from worker.cpu.sampler import Sampler
from worker.engine import DrawnToken, Engine, EngineSettings, Sequence
from worker.engine.kv_blocks import KvBlocks, blocks_for
from worker.gguf_file import GgufFile
from worker.model import KvType, ModelOptions
from worker.ops import KV_BLOCK, Batch, Phase
from worker.sampling import Sampling

GREEDY = Sampling(temperature=0)


def cpu_runner(
    path: Path,
    *,
    context: int = 512,
    sliding_window: Any = "auto",
    kv_blocks: int | None = None,
    kv_type: KvType = "f32",
    padding_ids: Iterable[int] = (),
    end_ids: Iterable[int] = (),
    slots: int = 8,
) -> CpuRunner:
    """Load a file on the CPU, by default with a KV pool of one context."""
    with GgufFile.open(path) as file:
        with uploader(file) as upload:
            model, _ = bind(file, ModelOptions(context, sliding_window), upload)
        hp = read_hparams(file)
    layers = (layer.attention for layer in model.layers)
    cache = KvCache(layers, blocks_for(context) if kv_blocks is None else kv_blocks, kv_type)
    return CpuRunner(model, cache, Sampler(hp.vocab_size, padding_ids, end_ids), slots)


def fill_cache(runner: CpuRunner, value: float = np.nan) -> None:
    """Set all keys and values, by default to what no result may depend on."""
    for each in (*runner.cache.k, *runner.cache.v):
        each.fill(value)


def prefill(
    prompt: list[int], start: int = 0, *, rows: list[int] | None = None, table: np.ndarray | None = None
) -> Batch:
    """A prefill batch of `prompt[start:]` that requests the logits of `rows`, by default of all."""
    positions = np.arange(start, len(prompt), dtype=np.int32)
    table = np.arange(blocks_for(len(prompt) + KV_BLOCK), dtype=np.int32) if table is None else table
    logit_rows = np.arange(len(positions), dtype=np.int32) if rows is None else np.array(rows, np.int32)
    return Batch(Phase.PREFILL, np.array(prompt[start:], np.int32), positions, (table,), logit_rows)


def decode(token: int, position: int, table: np.ndarray) -> Batch:
    """A decode batch of one token."""
    one = np.zeros(1, np.int32)
    return Batch(Phase.DECODE, one + token, one + position, (table,), one)


def engine_of(
    runner: Any,
    *,
    context: int = 512,
    chunk: int = 64,
    running: int = 1,
    order: Any = None,
    prefix_cache: bool = True,
    beside: int = 128,
    speculation: Any = "off",
) -> Engine:
    """An engine over a runner; `order` is the order in which KV blocks are allocated."""
    blocks = None if order is None else KvBlocks(len(order), np.asarray(order, np.int32))
    return Engine(runner, EngineSettings(context, chunk, running, prefix_cache, beside, speculation), blocks)


def run(engine: Engine, *sequences: Sequence) -> dict[str, list[DrawnToken]]:
    """Run sequences until they finish: their tokens by sequence id."""
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


def free_kv_blocks(engine: Engine) -> int:
    """KV blocks that no sequence reads, cached ones included."""
    return engine.kv_blocks["cached"] + engine.kv_blocks["free"]
