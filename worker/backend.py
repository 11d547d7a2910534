"""Interface between the runtime and a device: memory plan, uploads, runner, accounting.

Implementations: `worker/cpu/backend.py` and `worker/gpu/backend.py`. Every method is called on the
one thread that owns the device. Next: `worker/runtime.py`, which calls it.
"""

import hashlib
import math
import platform
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import numpy as np

from worker.errors import InsufficientVram
from worker.gguf_file import GgufFile, TensorInfo
from worker.model import Hparams, KvType, Model, ModelOptions, Runner
from worker.ops import KV_BLOCK, Attention, QTensor


class Upload(Protocol):
    """Starts the upload of a tensor."""

    def __call__(self, info: TensorInfo, scale: float = 1.0) -> QTensor:
        """Return the tensor on its device. `scale` multiplies a vector in f32; a matrix has 1."""


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes by purpose. `runtime`: used by process or device context before loading."""

    weights: int = 0
    kv: int = 0
    activations: int = 0
    workspace: int = 0
    runtime: int = 0
    free: int = 0

    @property
    def used(self) -> int:
        """All bytes except `free`."""
        return self.weights + self.kv + self.activations + self.workspace + self.runtime


@dataclass(frozen=True, slots=True)
class Plan:
    """What serving one file on one backend takes, in bytes and tokens."""

    hparams: Hparams
    options: ModelOptions
    attention: tuple[Attention, ...]
    """Attention of each layer, without its weights."""
    choices: Mapping[str, str]
    """See `Model.choices`."""
    weights: tuple[TensorInfo, ...]
    """Tensors that the architecture uses."""
    unused: tuple[str, ...]
    """Names of the other tensors, which text generation does not need."""
    weight_bytes: int
    kv_bytes_per_token: int
    overhead_bytes: int
    available: int
    kv_blocks: int

    @property
    def context(self) -> int:
        """Longest sequence, in tokens: the minimum of file, setting and KV pool."""
        return min(self.options.context, self.kv_blocks * KV_BLOCK)

    @property
    def shortfall(self) -> InsufficientVram | None:
        """The error if weights, activations and one KV block do not fit; None if they do."""
        if self.kv_blocks:
            return None
        required = self.weight_bytes + self.overhead_bytes + self.kv_bytes_per_token * KV_BLOCK
        return InsufficientVram(required, self.available, "the model's weights and one KV block")

    @property
    def untied(self) -> bool:
        """Whether the output head is a matrix of its own, not the embedding."""
        return any(info.name == "output.weight" for info in self.weights)

    def product_flops(self, tokens: int, heads: int) -> int:
        """Multiplications and additions of the products; the head runs for `heads` tokens."""
        hp, head = self.hparams, "output.weight" if self.untied else "token_embd.weight"
        total = 0
        for info in self.weights:
            if len(info.shape) < 2 or info.name.endswith(".bias") or info.name == "token_embd.weight" != head:
                continue
            if info.is_table:
                continue
            elements = math.prod(info.shape)
            if "_exps." in info.name:
                elements = elements * hp.expert_used_count // hp.expert_count
            total += 2 * elements * (heads if info.name == head else tokens)
        return total


class Device(Protocol):
    """The part of a backend that the service uses after loading, on the engine's thread."""

    device: str
    """The device's own name, as logs and `worker inspect` show it."""

    def memory(self) -> MemoryUse:
        """Current bytes by purpose."""
        ...

    def non_resident(self) -> tuple[int, list[str]]:
        """Number of allocations checked, and addresses of those that are not device memory."""
        ...


class Backend(Device, Protocol):
    """One device: memory arithmetic before a model is loaded, loading, accounting afterwards."""

    name: str
    """cpu or gpu."""
    kv_type: KvType
    """How keys and values are stored."""
    kv_share: float
    """Share of the free memory that the KV pool takes if `engine.kv_memory` is auto."""

    def prefill_chunk(self, plan: Plan) -> int:
        """Default number of prompt tokens per step, which bounds the delay of a cancellation."""
        ...

    def check(self, model: Model, hp: Hparams) -> None:
        """Raise ModelLoadFailed for a model that the device has no kernels for."""
        ...

    def weight_bytes(self, info: TensorInfo) -> int:
        """Bytes of a tensor on the device. Raises ModelLoadFailed for an unsupported shape."""
        ...

    def kv_bytes_per_token(self, model: Model) -> int:
        """Bytes of one token's K and V over all layers."""
        ...

    def overhead_bytes(self, model: Model, hp: Hparams, max_running: int, *, drafts: bool = False) -> int:
        """Upper bound of activations and workspace, for `max_running` sequences at once.

        `model` may be without weights. `drafts`: steps may have draft tokens.
        """
        ...

    def available_bytes(self) -> int:
        """Bytes that are free now."""
        ...

    def uploader(self, file: GgufFile, plan: Plan, on_bytes: Callable[[int], None]) -> AbstractContextManager[Upload]:
        """Context for uploads: yields an `Upload`, and waits for all tensors on exit.

        A tensor's contents are undefined until then. If the body raises, the upload is abandoned
        and nothing stays on the device. `on_bytes` receives the file bytes of each chunk, one call
        at a time, from any thread.

        Raises:
            VramOom, CudaError: An allocation or a copy fails.
        """
        ...

    def runner(
        self,
        model: Model,
        plan: Plan,
        *,
        padding_ids: Iterable[int],
        end_ids: Iterable[int],
        max_running: int,
        drafts: bool = False,
    ) -> Runner:
        """Build a runner of `max_running` slots; called during the uploads, so it reads no weights.

        With `drafts` it supports `Runner.propose`.

        Raises:
            VramOom, CudaError: The device refuses memory or is lost.
        """
        ...

    def numerics(self) -> dict[str, str]:
        """Facts that decide bits, by name: equal facts and files give equal bits."""
        ...


_GRAMMARS = (
    "answer_grammar",
    "grammar",
    "grammar_vocabulary",
    "harmony_grammar",
    "json_schema",
    "lark",
    "tool_grammar",
)
_COMPUTING = (
    *("adapters", "ops.py", "quants.py", "rope.py", "sampling.py", "token_masks.py"),
    *(f"text/{name}.py" for name in _GRAMMARS),
)
"""Sources of this package that decide bits, or which tokens a grammar allows, on every backend."""


def host_facts() -> dict[str, str]:
    """Facts of the host that decide bits: NumPy computes all RoPE tables and the CPU's ops.

    llguidance computes the masks of grammars.
    """
    simd = np.show_config(mode="dicts")["SIMD Extensions"].get("found", ())
    return {
        "machine": platform.machine(),
        "numpy": np.__version__,
        "simd": " ".join(simd),
        "llguidance": version("llguidance"),
    }


def source_digest(package: str, root: Path = Path(__file__).parent) -> str:
    """SHA-256 (hex) of sources that decide bits: the package `cpu` or `gpu`, and `_COMPUTING`."""
    digest = hashlib.sha256()
    for name in (package, *_COMPUTING):
        path = root / name
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.suffix in (".py", ".cu", ".cuh"):
                text = file.read_bytes()
                digest.update(f"{file.relative_to(root).as_posix()} {len(text)}\n".encode() + text)
    return digest.hexdigest()
