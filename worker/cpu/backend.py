"""The CPU as a device: weights, but for tables, are f32 arrays. Next: `runner.py`."""

import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
from threadpoolctl import threadpool_info

from worker.backend import MemoryUse, Plan, Upload, host_facts, source_digest
from worker.cpu.kv_cache import KvCache
from worker.cpu.runner import CpuRunner
from worker.cpu.sampler import Sampler
from worker.gguf_file import GgufFile, TensorInfo
from worker.model import MAX_DRAFT_ROWS, Hparams, KvType, Model, kv_bytes_per_token
from worker.ops import KV_BLOCK, QTensor
from worker.quants import Bytes, Floats, QuantType, dequantize

WEIGHT_BYTES = 4
"""Bytes of a weight on the CPU, for every type in the file, but for tables."""
_CHUNK = 64
"""Prompt tokens of a step by default."""


@dataclass(frozen=True, slots=True)
class BlockRows:
    """Rows of a table as blocks of the file, [rows, row_bytes] u8; an index gives them as f32."""

    kind: QuantType
    blocks: Bytes

    def __getitem__(self, rows: Any) -> Floats:
        return dequantize(np.atleast_2d(self.blocks[rows]), self.kind)


@contextmanager
def uploader(file: GgufFile, on_bytes: Callable[[int], None] = lambda _: None) -> Iterator[Upload]:
    """See `Backend.uploader`. Tensors but tables are f32 arrays, filled when the context exits."""
    targets: list[tuple[TensorInfo, Floats, float]] = []

    def upload(info: TensorInfo, scale: float = 1.0) -> QTensor:
        if info.is_table:
            blocks = np.array(file.data(info))
            on_bytes(info.nbytes)
            return QTensor(info.name, info.shape, info.kind, BlockRows(info.kind, blocks))
        values = np.empty(info.shape, np.float32)
        targets.append((info, values, scale))
        return QTensor(info.name, info.shape, info.kind, values)

    yield upload
    for info, values, scale in targets:
        pieces = list(file.pieces(info))
        for piece, out in zip(pieces, values.reshape(len(pieces), -1), strict=True):
            dequantize(piece, info.kind, out=out)
        if scale != 1.0:
            np.multiply(values, np.float32(scale), out=values)
        on_bytes(info.nbytes)


class CpuBackend:
    """`worker.backend.Backend` on NumPy."""

    name = "cpu"
    kv_share = 0.0
    """The KV pool holds one context: the host's memory is shared with other programs."""

    def __init__(self, kv_type: KvType = "f32") -> None:
        self.device = platform.processor() or platform.machine()
        self.kv_type: KvType = kv_type
        self._runtime_bytes = psutil.Process().memory_info().rss
        self._plan: Plan | None = None

    def prefill_chunk(self, plan: Plan) -> int:
        """See `Backend.prefill_chunk`."""
        return _CHUNK

    def check(self, model: Model, hp: Hparams) -> None:
        """See `Backend.check`. NumPy computes every shape."""

    def weight_bytes(self, info: TensorInfo) -> int:
        """See `Backend.weight_bytes`: f32, or the blocks of a table."""
        return info.nbytes if info.is_table else int(np.prod(info.shape)) * WEIGHT_BYTES

    def kv_bytes_per_token(self, model: Model) -> int:
        return kv_bytes_per_token((layer.attention for layer in model.layers), self.kv_type)

    def overhead_bytes(self, model: Model, hp: Hparams, max_running: int, *, drafts: bool = False) -> int:
        """See `Backend.overhead_bytes`: RoPE tables, logits and widest activations of a batch."""
        tables = sum(rope.nbytes for rope in {layer.attention.rope for layer in model.layers})
        widest = max(
            hp.vocab_size, hp.ffn_width, hp.layer_inputs_width, *(layer.attention.q_width for layer in model.layers)
        )
        return tables + 4 * max(_CHUNK, max_running, MAX_DRAFT_ROWS if drafts else 0) * 4 * widest

    def available_bytes(self) -> int:
        return int(psutil.virtual_memory().available)

    @contextmanager
    def uploader(self, file: GgufFile, plan: Plan, on_bytes: Callable[[int], None]) -> Iterator[Upload]:
        with uploader(file, on_bytes) as upload:
            yield upload
        self._plan = plan

    def runner(
        self,
        model: Model,
        plan: Plan,
        *,
        padding_ids: Iterable[int],
        end_ids: Iterable[int],
        max_running: int = 1,
        drafts: bool = False,
    ) -> CpuRunner:
        sampler = Sampler(plan.hparams.vocab_size, padding_ids, end_ids)
        return CpuRunner(model, KvCache(plan.attention, plan.kv_blocks, self.kv_type), sampler, max_running)

    def memory(self) -> MemoryUse:
        """See `Backend.memory`. Activations are freed after a step; the KV pool counts in full."""
        if self._plan is None:
            return MemoryUse(runtime=self._runtime_bytes, free=self.available_bytes())
        return MemoryUse(
            weights=self._plan.weight_bytes,
            kv=self._plan.kv_blocks * KV_BLOCK * self._plan.kv_bytes_per_token,
            runtime=self._runtime_bytes,
            free=self.available_bytes(),
        )

    def non_resident(self) -> tuple[int, list[str]]:
        """See `Device.non_resident`. Every array of the host is resident."""
        return (len(self._plan.weights) if self._plan else 0), []

    def numerics(self) -> dict[str, str]:
        """See `Backend.numerics`. The number of threads is left out: it changes no bits."""
        blas = [each for each in threadpool_info() if each["user_api"] == "blas"]
        libraries = sorted(f"{each['internal_api']} {each['version']} {each.get('architecture')}" for each in blas)
        return {
            "backend": self.name,
            "blas": ", ".join(libraries),
            "kv_type": self.kv_type,
            "sources": source_digest("cpu"),
            **host_facts(),
        }
