"""From settings to a ready engine, and the one place that does it: file, adapter, backend, memory, weights.

Knows nothing of jobs. `plan` is the arithmetic before anything is copied, and what `worker inspect` shows; `load` goes
through with it. Next: `worker/adapters/__init__.py`, `worker/cpu/runner.py`, `worker/engine/engine.py`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil

from worker.adapters import adapter_for
from worker.adapters.hparams import read_hparams
from worker.adapters.weights import Weights, describe
from worker.config import EngineSection, ModelSection
from worker.cpu import runner as cpu
from worker.engine import Engine, EngineSettings
from worker.engine.kv_blocks import blocks_for
from worker.errors import ConfigInvalid, InsufficientVram, ModelLoadFailed
from worker.gguf_file import GgufFile, TensorInfo
from worker.model import Hparams, ModelOptions
from worker.ops import KV_BLOCK
from worker.text.tokenizer import Tokenizer, load_tokenizer

_KV_TYPES: dict[str, type[np.floating]] = {"f32": np.float32, "f16": np.float16}

Progress = Callable[[int, int], None]
"""Hears (bytes done, bytes in all) while weights are read."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What serving a file takes, in bytes and tokens, on the backend that was asked for."""

    hparams: Hparams
    options: ModelOptions
    backend: str
    weights: tuple[TensorInfo, ...]
    unused: tuple[str, ...]
    weight_bytes: int
    kv_bytes_per_token: int
    kv_blocks: int
    available: int

    @property
    def context(self) -> int:
        """min(file, setting, KV pool), in tokens."""
        return min(self.options.context, self.kv_blocks * KV_BLOCK)

    @property
    def shortfall(self) -> InsufficientVram | None:
        """Why it does not fit: weights and at least one KV block must."""
        required = self.weight_bytes + self.kv_bytes_per_token * KV_BLOCK
        if self.kv_blocks:
            return None
        return InsufficientVram(required, self.available, "the model's weights and one KV block")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready to answer."""

    name: str
    fingerprint: str
    hparams: Hparams
    tokenizer: Tokenizer
    engine: Engine


def pick_backend(wanted: str) -> str:
    """cpu or gpu; auto takes the GPU where this installation has one. Raises ConfigInvalid where gpu is not there."""
    gpu = importlib.util.find_spec("worker.gpu") is not None and importlib.util.find_spec("cupy") is not None
    if wanted == "gpu" and not gpu:
        raise ConfigInvalid("backend gpu is not installed here; use --backend cpu")
    return "gpu" if gpu and wanted != "cpu" else "cpu"


def plan(file: GgufFile, model: ModelSection, engine: EngineSection) -> Plan:
    """Check every name and shape and count what serving takes. Raises ModelLoadFailed where they don't fit."""
    hp = read_hparams(file)
    context = min(hp.context_length, model.context or hp.context_length)
    options = ModelOptions(context=context, phi3_window=model.phi3_window)
    weights = Weights(file, describe)
    adapter_for(file.architecture, str(file.path))(hp, weights, replace(options, context=1))
    claimed = tuple(weights.claimed())
    weight_bytes = sum(cpu.weight_bytes(info) for info in claimed)
    per_token = hp.kv_bytes_per_token(np.dtype(_KV_TYPES[engine.kv_type]).itemsize)
    available = psutil.virtual_memory().available
    affordable = max(0, available - weight_bytes) // (per_token * KV_BLOCK)
    return Plan(
        hparams=hp,
        options=options,
        backend=pick_backend(engine.backend),
        weights=claimed,
        unused=tuple(weights.unused()),
        weight_bytes=weight_bytes,
        kv_bytes_per_token=per_token,
        kv_blocks=min(blocks_for(context), affordable),
        available=available,
    )


def load(path: Path, model: ModelSection, engine: EngineSection, progress: Progress | None = None) -> Loaded:
    """Open, check, plan and load a model file. Raises ModelLoadFailed or InsufficientVram before anything is copied."""
    with GgufFile.open(path) as file:
        planned = plan(file, model, engine)
        if planned.shortfall:
            raise planned.shortfall
        tokenizer = load_tokenizer(file.metadata)
        if tokenizer.vocab.size > planned.hparams.vocab_size:
            raise ModelLoadFailed(
                f"{tokenizer.vocab.size} tokens for {planned.hparams.vocab_size} embedding rows",
                str(path),
                "a row for every token",
            )
        runner = _cpu_runner(file, planned, engine, tokenizer, progress)
        settings = EngineSettings(planned.context, engine.prefill_chunk)
        name = model.name or file.get("general.name", str, path.stem)
        return Loaded(name, file.fingerprint(), planned.hparams, tokenizer, Engine(runner, settings))


def _cpu_runner(
    file: GgufFile, planned: Plan, engine: EngineSection, tokenizer: Tokenizer, progress: Progress | None
) -> cpu.CpuRunner:
    total = sum(info.nbytes for info in planned.weights)
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    hp = planned.hparams
    weights = Weights(file, cpu.upload(file, on_bytes))
    bound = adapter_for(hp.architecture, str(file.path))(hp, weights, planned.options)
    padding = tokenizer.vocab.padding_ids | set(range(tokenizer.vocab.size, hp.vocab_size))
    return cpu.CpuRunner(
        bound,
        hp,
        kv_blocks=planned.kv_blocks,
        kv_dtype=_KV_TYPES[engine.kv_type],
        padding_ids=padding,
        end_ids=tokenizer.vocab.end_ids,
    )
