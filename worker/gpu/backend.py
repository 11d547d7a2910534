"""One NVIDIA GPU as a device: what a model takes there, how it comes there, what it holds.

Next: `upload.py`, `runner.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from worker.backend import Bind, MemoryUse, Placement
from worker.errors import CudaError
from worker.gguf_file import GgufFile, TensorInfo
from worker.gpu.attention import MAX_PARTIAL_BYTES
from worker.gpu.compiler import Kernels
from worker.gpu.layouts import weight_bytes
from worker.gpu.memory import DeviceMemory, Pool, Purpose
from worker.gpu.runner import GpuRunner, GpuSettings
from worker.gpu.state import KV_ELEMENT_BYTES
from worker.gpu.upload import Upload, repack_kernels
from worker.model import Hparams

_MARGIN = 256 << 20
"""Left to the driver: kernels, graphs, its own bookkeeping."""


def has_gpu() -> bool:
    """Whether the driver knows a device."""
    import cupy  # noqa: PLC0415

    try:
        return bool(cupy.cuda.runtime.getDeviceCount() > 0)
    except cupy.cuda.runtime.CUDARuntimeError:
        return False


class GpuBackend:
    """`worker.backend.Backend` on the current CUDA device; `kernel_cache` keeps compiled kernels between starts."""

    name = "gpu"
    prefill_chunk = 1024
    uploads_aside = True

    def __init__(self, kernel_cache: Path) -> None:
        import cupy  # noqa: PLC0415

        runtime = cupy.cuda.runtime
        try:
            self.device: str = runtime.getDeviceProperties(0)["name"].decode()
            free, total = runtime.memGetInfo()
        except runtime.CUDARuntimeError as error:
            raise CudaError(f"the GPU can't be used: {error}") from error
        self._runtime_bytes = int(total - free)
        self._kernels = Kernels(kernel_cache)
        self._memory = DeviceMemory()

    def weight_bytes(self, info: TensorInfo) -> int:
        """See `Backend.weight_bytes`: the file's bytes, repacked, within 2 %."""
        return weight_bytes(info)

    def kv_bytes_per_token(self, hp: Hparams) -> int:
        """See `Backend.kv_bytes_per_token`."""
        return hp.kv_bytes_per_token(KV_ELEMENT_BYTES)

    def overhead_bytes(self, hp: Hparams) -> int:
        """Activations of a chunk, f32 and f16 side by side, attention's parts, the margin; a dry run tells exactly."""
        experts = max(1, hp.expert_used_count)
        a_token = 4 * hp.embedding_length + 3 * (hp.q_width + 2 * hp.kv_width) + 4 * experts * hp.feed_forward_length
        return 6 * self.prefill_chunk * a_token + 16 * hp.vocab_size + MAX_PARTIAL_BYTES + _MARGIN

    def available_bytes(self) -> int:
        """See `Backend.available_bytes`."""
        return self._memory.free

    def load(self, file: GgufFile, placement: Placement, bind: Bind, on_bytes: Callable[[int], None]) -> GpuRunner:
        """See `Backend.load`: weights travel to one slab while `bind` and the runner's beginnings go on."""
        for kernel in repack_kernels(placement.weights):
            self._kernels.begin(kernel)
        weights = sum(weight_bytes(info) for info in placement.weights)
        pool = Pool(self._memory, weights, Purpose.WEIGHTS)
        expected = sum(info.nbytes for info in placement.weights)
        upload = Upload(file, self._kernels, self._memory, pool, on_bytes, expected=expected)
        try:
            return GpuRunner(
                bind(upload),
                placement.hparams,
                self._memory,
                self._kernels,
                GpuSettings(placement.kv_blocks, placement.context, prefill_tokens=self.prefill_chunk),
                padding_ids=placement.padding_ids,
                end_ids=placement.end_ids,
                wait_for_weights=upload.close,
            )
        finally:
            upload.abandon()

    def memory(self) -> MemoryUse:
        """See `Backend.memory`."""
        used = self._memory.used
        return MemoryUse(
            weights=used[Purpose.WEIGHTS],
            kv=used[Purpose.KV],
            activations=used[Purpose.ACTIVATIONS],
            workspace=used[Purpose.WORKSPACE],
            runtime=self._runtime_bytes,
            free=self._memory.free,
        )

    def non_resident(self) -> tuple[int, list[str]]:
        """See `Backend.non_resident`: slabs by their pointer attributes."""
        return self._memory.slabs, [hex(address) for address in self._memory.non_resident()]
