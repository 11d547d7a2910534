"""From settings to a loaded model: file, adapter, backend, memory plan, weights, tokenizer, engine.

`plan` is the arithmetic before any device work, which `worker inspect` shows; `load` carries it out. Knows nothing of
jobs. Next: `worker/adapters/__init__.py`, `worker/backend.py`, `worker/engine/engine.py`.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from worker.adapters import bind
from worker.adapters.hparams import read_hparams
from worker.backend import Backend, Device, Plan
from worker.config import EngineSection, KvMemory, ModelSection
from worker.engine import Engine, EngineSettings
from worker.engine.kv_blocks import blocks_for
from worker.errors import ConfigInvalid, ModelLoadFailed
from worker.gguf_file import GgufFile
from worker.model import ModelOptions
from worker.ops import KV_BLOCK
from worker.text.tokenizer import Tokenizer, build_tokenizer
from worker.text.vocabulary import TokenizerMetadata, Vocabulary, read_vocabulary

MAX_KV_BLOCKS = 1 << 20
"""Bounds the host memory of the block lists, about 40 MB; 16 million tokens, the longest context a setting allows."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with its tokenizer and engine, ready to serve jobs. `worker/echo.py` makes one without a file."""

    name: str
    fingerprint: str
    """Digest of the model file and of the load-time choices that change the computation."""
    vocab_size: int
    """Rows of the embedding, padding rows included."""
    tokenizer: Tokenizer
    engine: Engine
    device: Device
    numerics_id: str
    """Digest of the facts that decide bits, see `Backend.numerics`."""


Progress = Callable[[int, int], None]
"""Receives (bytes done, bytes in total) while weights are read, at most 100 times."""

ModelLoader = Callable[[Progress], LoadedModel]
"""Loads the model; called on the engine's thread."""


def open_backend(engine: EngineSection) -> Backend:
    """The device that the settings name; auto is a GPU if CuPy is installed and the machine has one.

    Raises:
        ConfigInvalid: The backend is gpu and CuPy is not installed.
        CudaError: The GPU cannot be used.
    """
    cupy = importlib.util.find_spec("cupy") is not None
    if engine.backend == "gpu" and not cupy:
        raise ConfigInvalid("backend gpu needs CuPy: install worker-orcd[gpu], or take backend cpu")
    if cupy and engine.backend != "cpu":
        from worker.gpu.backend import GpuBackend, has_gpu  # noqa: PLC0415  (importing CuPy takes time)

        if engine.backend == "gpu" or has_gpu():
            return GpuBackend(engine.kernel_cache)
    from worker.cpu.backend import CpuBackend  # noqa: PLC0415

    return CpuBackend(np.float16 if engine.kv_type == "f16" else np.float32)


def plan(file: GgufFile, model: ModelSection, backend: Backend, kv_memory: KvMemory = "auto") -> Plan:
    """Check every key, name and shape of the file and compute its memory. Raises ModelLoadFailed."""
    hp = read_hparams(file)
    options = ModelOptions(min(hp.context_length, model.context or hp.context_length), model.sliding_window)
    bound, weights = bind(file, options)
    claimed = tuple(weights.claimed())
    weight_bytes = sum(backend.weight_bytes(info) for info in claimed)
    overhead, available = backend.overhead_bytes(hp), backend.available_bytes()
    per_token = backend.kv_bytes_per_token(hp)
    share = backend.kv_share if kv_memory == "auto" else kv_memory
    return Plan(
        hparams=hp,
        options=options,
        windows=tuple(layer.attention.window for layer in bound.layers),
        choices=bound.choices,
        weights=claimed,
        unused=tuple(weights.unused()),
        weight_bytes=weight_bytes,
        kv_bytes_per_token=per_token,
        overhead_bytes=overhead,
        available=available,
        kv_blocks=_kv_blocks(available - weight_bytes - overhead, share, options.context, per_token * KV_BLOCK),
    )


def _kv_blocks(free: int, limit: float, context: int, block_bytes: int) -> int:
    """Blocks of the KV pool in `free` bytes; `limit` is a number of bytes (int) or a share of `free` (float).

    One context's blocks if they are affordable, even above the limit; 0 if not one block is affordable.
    """
    affordable = max(0, free) // block_bytes
    limit_bytes = limit if isinstance(limit, int) else int(max(0, free) * limit)
    return min(affordable, MAX_KV_BLOCKS, max(blocks_for(context), limit_bytes // block_bytes))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Suspend the garbage collector: scanning a load's half a million lasting objects takes 10 % of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_collection()
def load(path: Path, model: ModelSection, engine: EngineSection, progress: Progress | None = None) -> LoadedModel:
    """Open, check, plan and load a model file.

    The tokenizer and the runner are built while weights are uploaded. If anything fails, nothing stays on the device.

    Raises:
        ModelLoadFailed, InsufficientVram: The file is refused; except for the tokenizer, before any device work.
        VramOom, CudaError: The device fails while loading.
    """
    with GgufFile.open(path) as file:
        backend = open_backend(engine)
        planned = plan(file, model, backend, engine.kv_memory)
        if planned.shortfall:
            raise planned.shortfall
        metadata = TokenizerMetadata(file.metadata)
        vocab = read_vocabulary(metadata)
        padding_ids = _padding_ids(vocab, planned.hparams.vocab_size, path)
        with backend.uploader(file, planned, _byte_counter(planned, progress)) as upload:
            bound, _ = bind(file, planned.options, upload)
            tokenizer = build_tokenizer(metadata, vocab)
            runner = backend.runner(bound, planned, padding_ids=padding_ids, end_ids=vocab.end_ids)
        chunk = engine.prefill_chunk or backend.prefill_chunk
        settings = EngineSettings(planned.context, chunk, prefix_cache=engine.prefix_cache)
        return LoadedModel(
            name=model.name or file.get("general.name", str, path.stem),
            fingerprint=fingerprint(file, planned.choices),
            vocab_size=planned.hparams.vocab_size,
            tokenizer=tokenizer,
            engine=Engine(runner, settings),
            device=backend,
            numerics_id=numerics_id(backend.numerics()),
        )


def fingerprint(file: GgufFile, choices: Mapping[str, str]) -> str:
    """Digest (hex) of the file's fingerprint and the load-time choices; the file's own if there are no choices."""
    if not choices:
        return file.fingerprint()
    return hashlib.sha256(json.dumps([file.fingerprint(), sorted(choices.items())]).encode()).hexdigest()


def numerics_id(facts: Mapping[str, str]) -> str:
    """Short digest (hex) of the facts that decide bits."""
    return hashlib.sha256(json.dumps(sorted(facts.items())).encode()).hexdigest()[:16]


def _padding_ids(vocab: Vocabulary, rows: int, path: Path) -> frozenset[int]:
    """Rows of the embedding without a token. Raises ModelLoadFailed if there are more tokens than rows."""
    if vocab.size > rows:
        raise ModelLoadFailed(f"{vocab.size} tokens for {rows} embedding rows", str(path), "a row for every token")
    return vocab.padding_ids | frozenset(range(vocab.size, rows))


def _byte_counter(planned: Plan, progress: Progress | None) -> Callable[[int], None]:
    """A function that adds up bytes and calls `progress` at most 100 times, since each call wakes the event loop."""
    total = sum(info.nbytes for info in planned.weights)
    done = percent = 0

    def on_bytes(count: int) -> None:
        nonlocal done, percent
        done += count
        if progress and 100 * done // total > percent:
            percent = 100 * done // total
            progress(done, total)

    return on_bytes
