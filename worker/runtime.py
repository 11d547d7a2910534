"""From settings to a ready engine, and the one place that does it: file, adapter, backend, memory, weights.

Knows nothing of jobs. `plan` is the arithmetic before anything is copied, and what `worker inspect` shows; `load` goes
through with it. Next: `worker/adapters/__init__.py`, `worker/backend.py`, `worker/engine/engine.py`.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from worker.adapters import adapter_for
from worker.adapters.hparams import read_hparams
from worker.adapters.weights import Weights, describe
from worker.backend import Backend, Device, Placement, Upload
from worker.config import EngineSection, ModelSection
from worker.engine import Engine, EngineSettings
from worker.engine.kv_blocks import blocks_for
from worker.errors import ConfigInvalid, InsufficientVram, ModelLoadFailed
from worker.gguf_file import GgufFile, TensorInfo
from worker.model import Hparams, Model, ModelOptions
from worker.ops import KV_BLOCK
from worker.text.metadata import Metadata
from worker.text.tokenizer import Tokenizer, build_tokenizer
from worker.text.vocabulary import Vocabulary, read_vocabulary

Progress = Callable[[int, int], None]
"""Hears (bytes done, bytes in all) while weights are read, a hundred times at most."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What serving a file takes, in bytes and tokens, on one backend."""

    hparams: Hparams
    options: ModelOptions
    weights: tuple[TensorInfo, ...]
    unused: tuple[str, ...]
    weight_bytes: int
    kv_bytes_per_token: int
    overhead_bytes: int
    kv_blocks: int
    available: int

    @property
    def context(self) -> int:
        """min(file, setting, KV pool), in tokens."""
        return min(self.options.context, self.kv_blocks * KV_BLOCK)

    @property
    def shortfall(self) -> InsufficientVram | None:
        """Why it does not fit: weights, activations and at least one KV block must."""
        if self.kv_blocks:
            return None
        required = self.weight_bytes + self.overhead_bytes + self.kv_bytes_per_token * KV_BLOCK
        return InsufficientVram(required, self.available, "the model's weights and one KV block")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with its tokenizer and engine, ready to serve jobs. `worker/echo.py` makes one without a file."""

    name: str
    fingerprint: str
    """Digest of the model file; models with equal fingerprints produce equal tokens."""
    vocab_size: int
    """Rows of the embedding, padding rows included."""
    tokenizer: Tokenizer
    engine: Engine
    device: Device
    numerics_id: str
    """Equal ids compute equal bits from equal files: backend, kernels, compiler, device kind, fixed orders."""


ModelLoader = Callable[[Progress], LoadedModel]
"""Loads the model; called on the engine's thread."""


def open_backend(engine: EngineSection) -> Backend:
    """The device that the settings name; auto takes a GPU where this installation and machine have one.

    Raises ConfigInvalid where gpu is asked for and CuPy is not installed, CudaError where the GPU can't be used.
    """
    cupy = importlib.util.find_spec("cupy") is not None
    if engine.backend == "gpu" and not cupy:
        raise ConfigInvalid("backend gpu needs CuPy: install worker-orcd[gpu], or take backend cpu")
    if cupy and engine.backend != "cpu":
        from worker.gpu.backend import GpuBackend, has_gpu  # noqa: PLC0415  (CuPy costs a start that needs none)

        if engine.backend == "gpu" or has_gpu():
            return GpuBackend(engine.kernel_cache)
    from worker.cpu.backend import CpuBackend  # noqa: PLC0415

    return CpuBackend(np.float16 if engine.kv_type == "f16" else np.float32)


def plan(file: GgufFile, model: ModelSection, backend: Backend) -> Plan:
    """Check every name and shape and count what serving takes. Raises ModelLoadFailed where they don't fit."""
    hp = read_hparams(file)
    context = min(hp.context_length, model.context or hp.context_length)
    options = ModelOptions(context=context, phi3_window=model.phi3_window)
    weights = Weights(file, describe)
    adapter_for(file.architecture, str(file.path))(hp, weights, replace(options, context=1))
    claimed = tuple(weights.claimed())
    weight_bytes = sum(backend.weight_bytes(info) for info in claimed)
    overhead, per_token, available = (
        backend.overhead_bytes(hp),
        backend.kv_bytes_per_token(hp),
        backend.available_bytes(),
    )
    affordable = max(0, available - weight_bytes - overhead) // (per_token * KV_BLOCK)
    return Plan(
        hparams=hp,
        options=options,
        weights=claimed,
        unused=tuple(weights.unused()),
        weight_bytes=weight_bytes,
        kv_bytes_per_token=per_token,
        overhead_bytes=overhead,
        kv_blocks=min(blocks_for(context), affordable),
        available=available,
    )


@contextmanager
def _no_collection() -> Iterator[None]:
    """A load makes half a million objects, all of them to stay: looking for cycles among them takes a tenth of it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_collection()
def load(path: Path, model: ModelSection, engine: EngineSection, progress: Progress | None = None) -> LoadedModel:
    """Open, check, plan and load a model file. Raises ModelLoadFailed or InsufficientVram before anything is copied.

    Only that a tokenizer can't be built may be found out while weights are on their way; they are stopped then.
    """
    with GgufFile.open(path) as file:
        backend = open_backend(engine)
        planned = plan(file, model, backend)
        if planned.shortfall:
            raise planned.shortfall
        metadata = Metadata(file.metadata)
        vocab = read_vocabulary(metadata)
        placement = _placement(planned, vocab, path)
        # Beside the uploads, or else before them: a bad file is refused at once.
        tokenizer = None if backend.uploads_aside else build_tokenizer(metadata, vocab)

        def bind(upload: Upload) -> Model:
            nonlocal tokenizer
            adapter = adapter_for(planned.hparams.architecture, str(path))
            bound = adapter(planned.hparams, Weights(file, upload), replace(planned.options, context=planned.context))
            tokenizer = tokenizer or build_tokenizer(metadata, vocab)
            return bound

        runner = backend.load(file, placement, bind, _counted(planned, progress))
        assert tokenizer is not None, "every backend binds"
        chunk = engine.prefill_chunk or backend.prefill_chunk
        settings = EngineSettings(planned.context, chunk, prefix_cache=engine.prefix_cache)
        name = model.name or file.get("general.name", str, path.stem)
        vocab_size, built = planned.hparams.vocab_size, Engine(runner, settings)
        return LoadedModel(name, file.fingerprint(), vocab_size, tokenizer, built, backend, backend.name)


def _placement(planned: Plan, vocab: Vocabulary, path: Path) -> Placement:
    """What goes to the device. Raises ModelLoadFailed for a vocabulary with more tokens than the embedding has rows."""
    rows = planned.hparams.vocab_size
    if vocab.size > rows:
        raise ModelLoadFailed(f"{vocab.size} tokens for {rows} embedding rows", str(path), "a row for every token")
    return Placement(
        hparams=planned.hparams,
        weights=planned.weights,
        context=planned.context,
        kv_blocks=planned.kv_blocks,
        padding_ids=vocab.padding_ids | frozenset(range(vocab.size, rows)),
        end_ids=vocab.end_ids,
    )


def _counted(planned: Plan, progress: Progress | None) -> Callable[[int], None]:
    """Adds up the bytes of each piece, for a progress that hears sums: at each hundredth, for a listener takes time."""
    total = sum(info.nbytes for info in planned.weights)
    done = told = 0

    def on_bytes(count: int) -> None:
        nonlocal done, told
        done += count
        if progress and 100 * done // total > told:
            told = 100 * done // total
            progress(done, total)

    return on_bytes
