"""From settings to a loaded model: file, adapter, backend, memory plan, weights, tokenizer, engine.

`plan` is the arithmetic before any device work, which `worker inspect` shows; `load` carries it
out. Next: `worker/adapters/__init__.py`, `worker/backend.py`, `worker/engine/engine.py`.
"""

import gc
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from worker.adapters import adapter_for, bind
from worker.adapters.hparams import read_hparams
from worker.adapters.keys import ignored_keys, unknown_keys
from worker.backend import Backend, Device, Plan
from worker.config import EngineSection, KvMemory, ModelSection
from worker.engine import Engine, EngineSettings
from worker.engine.kv_blocks import blocks_for
from worker.errors import ConfigInvalid, ModelLoadFailed
from worker.gguf_file import GgufFile
from worker.model import ModelOptions
from worker.ops import KV_BLOCK
from worker.text.tokenizer import Tokenizer, build_tokenizer
from worker.text.vocabulary import TokenizerMetadata, read_vocabulary

MAX_KV_BLOCKS = 1 << 20
"""16 million tokens, the longest context a setting allows; bounds the block lists to 40 MB."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with tokenizer and engine, ready to serve jobs; `worker/echo.py` needs no file."""

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
    warning: str = ""
    """What of the file is not used and may deserve a look; empty if nothing."""


Progress = Callable[[int, int], None]
"""Receives (bytes done, bytes in total) while weights are read, at most 100 times."""

ModelLoader = Callable[[Progress], LoadedModel]
"""Loads the model; called on the engine's thread."""


def open_backend(engine: EngineSection) -> Backend:
    """The device of the settings; auto is a GPU if CuPy is installed and a GPU is present.

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
            return GpuBackend(engine.kernel_cache, "q8" if engine.kv_type == "q8" else "f16", engine.prefill_chunk)
    from worker.cpu.backend import CpuBackend  # noqa: PLC0415

    return CpuBackend(engine.kv_type)


def plan(
    file: GgufFile,
    model: ModelSection,
    backend: Backend,
    kv_memory: KvMemory = "auto",
    max_running: int = 1,
    *,
    drafts: bool = False,
) -> Plan:
    """Check keys, names and shapes of the file and compute its memory. Raises ModelLoadFailed."""
    adapter_for(file)
    hp = read_hparams(file)
    options = ModelOptions(min(hp.context_length, model.context or hp.context_length), model.sliding_window)
    bound, weights = bind(file, options)
    backend.check(bound, hp)
    claimed = tuple(weights.claimed())
    weight_bytes = sum(backend.weight_bytes(info) for info in claimed)
    overhead, available = backend.overhead_bytes(bound, hp, max_running, drafts=drafts), backend.available_bytes()
    per_token = backend.kv_bytes_per_token(bound)
    share = backend.kv_share if kv_memory == "auto" else kv_memory
    return Plan(
        hparams=hp,
        options=options,
        attention=tuple(layer.attention for layer in bound.layers),
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
    """Blocks of the KV pool in `free` bytes; `limit`: bytes (int) or a share of `free` (float).

    One context's blocks if affordable, even above the limit; 0 if not one block is.
    """
    affordable = max(0, free) // block_bytes
    limit_bytes = limit if isinstance(limit, int) else int(max(0, free) * limit)
    return min(affordable, MAX_KV_BLOCKS, max(blocks_for(context), limit_bytes // block_bytes))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Suspend garbage collection, which takes 10 % of a load's time and finds nothing."""
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

    The tokenizer and the runner are made during the upload; a failure leaves nothing on the device.

    Raises:
        ModelLoadFailed, InsufficientVram: The file is refused; for its tokenizer during uploads.
        VramOom, CudaError: The device fails while loading.
    """
    with GgufFile.open(path) as file:
        backend = open_backend(engine)
        drafts = engine.speculation != "off"
        planned = plan(file, model, backend, engine.kv_memory, engine.max_running, drafts=drafts)
        if planned.shortfall:
            raise planned.shortfall
        metadata = TokenizerMetadata(file.metadata)
        vocab = read_vocabulary(metadata)
        padding_ids = vocab.padding_ids | padding_rows(vocab.size, planned.hparams.vocab_size, path)
        with backend.uploader(file, planned, _byte_counter(planned, progress)) as upload:
            bound, _ = bind(file, planned.options, upload)
            tokenizer = build_tokenizer(metadata, vocab)
            masked = padding_ids | vocab.suppressed_ids
            runner = backend.runner(
                *(bound, planned),
                padding_ids=masked,
                end_ids=vocab.end_ids,
                max_running=engine.max_running,
                drafts=drafts,
            )
        chunk = engine.prefill_chunk or backend.prefill_chunk(planned)
        settings = EngineSettings(
            planned.context, chunk, engine.max_running, engine.prefix_cache, speculation=engine.speculation
        )
        return LoadedModel(
            name=model.name or file.name,
            fingerprint=fingerprint(file, planned.choices),
            vocab_size=planned.hparams.vocab_size,
            tokenizer=tokenizer,
            engine=Engine(runner, settings),
            device=backend,
            numerics_id=numerics_id(backend.numerics()),
            warning=ignored_keys(unknown_keys(file)),
        )


def fingerprint(file: GgufFile, choices: Mapping[str, str]) -> str:
    """Digest (hex) of the file's fingerprint and load-time choices, or the file's own."""
    if not choices:
        return file.fingerprint()
    return hashlib.sha256(json.dumps([file.fingerprint(), sorted(choices.items())]).encode()).hexdigest()


def numerics_id(facts: Mapping[str, str]) -> str:
    """Short digest (hex) of the facts that decide bits."""
    return hashlib.sha256(json.dumps(sorted(facts.items())).encode()).hexdigest()[:16]


def padding_rows(tokens: int, rows: int, path: Path) -> frozenset[int]:
    """Embedding rows above the tokens. Raises ModelLoadFailed for more tokens than rows."""
    if tokens > rows:
        raise ModelLoadFailed(f"{tokens} tokens for {rows} embedding rows", str(path), "a row for every token")
    return frozenset(range(tokens, rows))


def _byte_counter(planned: Plan, progress: Progress | None) -> Callable[[int], None]:
    """Sum up bytes and call `progress` at most 100 times: each call wakes the event loop."""
    total = sum(info.nbytes for info in planned.weights)
    done = percent = 0

    def on_bytes(count: int) -> None:
        nonlocal done, percent
        done += count
        if progress and 100 * done // total > percent:
            percent = 100 * done // total
            progress(done, total)

    return on_bytes
