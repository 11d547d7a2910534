"""One NVIDIA GPU as a device: memory arithmetic, uploads, the runner and memory accounting.

Next: `upload.py`, `runner.py`.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from worker import backend
from worker.backend import MemoryUse, Plan
from worker.errors import CudaError
from worker.gguf_file import GgufFile, TensorInfo
from worker.gpu.attention import table_bytes
from worker.gpu.compiler import Kernels
from worker.gpu.decode_attention import decode_partial_bytes
from worker.gpu.glu_bounds import bounds_bytes
from worker.gpu.head_norms import check_head_dim
from worker.gpu.layouts import weight_bytes
from worker.gpu.matvec import check_experts
from worker.gpu.memory import DeviceMemory, Pool, Purpose
from worker.gpu.numerics import numerics
from worker.gpu.prefill_attention import MAX_PARTIAL_BYTES
from worker.gpu.prefill_state import chunks_at_most
from worker.gpu.runner import GpuRunner, GpuSettings, rows_at_most
from worker.gpu.sampler import ROW_BYTES, SLOT_BYTES
from worker.gpu.upload import Upload, repack_kernels
from worker.model import Hparams, KvType, Model, kv_bytes_per_token
from worker.ops import KV_BLOCK

_MARGIN = 256 << 20
"""Bytes left to the driver for kernels and graphs."""


def has_gpu() -> bool:
    """Whether the driver reports a device."""
    import cupy  # noqa: PLC0415

    try:
        return bool(cupy.cuda.runtime.getDeviceCount() > 0)
    except cupy.cuda.runtime.CUDARuntimeError:
        return False


_CHUNK_S = 0.08
"""Longest products of a chunk by default: a cancellation has to take effect within 0.1 s."""
_FLOP_RATE = {False: 1.7e12, True: 3.3e12}
"""FLOP/s of a multiprocessor in products of prefill, without and with `wgmma`."""
_LEAST_CHUNK = 64


_ROWS_PER_PROCESSOR = 32
"""Rows with which products by `wgmma` fill a multiprocessor: of these, a power of two is used."""
_MOST_ROWS = {False: 1024, True: 4096}
"""Rows of a prefill batch on a whole device, without and with `wgmma`."""


def batch_rows(chunk: int, processors: int, *, wgmma: bool) -> int:
    """Rows of a prefill batch: those that fill the device, or `chunk` if it is fewer and not 0.

    The activations' memory is proportional to it.
    """
    filling = 1 << ((_ROWS_PER_PROCESSOR * processors).bit_length() - 1) if wgmma else _MOST_ROWS[False]
    return min(chunk or filling, filling, _MOST_ROWS[wgmma])


class GpuBackend:
    """`worker.backend.Backend` on the current CUDA device; kernels are cached on disk."""

    name = "gpu"
    kv_type: KvType = "f16"
    kv_share = 0.9
    """The rest is for fragmentation and CUDA graphs, whose size is known after capture."""

    def __init__(self, kernel_cache: Path, kv_type: KvType = "f16", prefill_chunk: int = 0) -> None:
        import cupy  # noqa: PLC0415

        runtime = cupy.cuda.runtime
        try:
            self.device: str = runtime.getDeviceProperties(0)["name"].decode()
            free, total = runtime.memGetInfo()
        except runtime.CUDARuntimeError as error:
            raise CudaError(f"the GPU cannot be used: {error}") from error
        self._runtime_bytes = int(total - free)
        self.kv_type = kv_type
        self._kernels = Kernels(kernel_cache)
        self.batch_rows = batch_rows(prefill_chunk, self._kernels.processors, wgmma=self._kernels.wgmma)
        self._memory = DeviceMemory()

    def prefill_chunk(self, plan: Plan) -> int:
        """See `Backend.prefill_chunk`: a batch, or less if its products take too long."""
        within = _CHUNK_S * _FLOP_RATE[self._kernels.wgmma] * self._kernels.processors
        chunk = self.batch_rows
        while chunk > _LEAST_CHUNK and plan.product_flops(chunk, heads=1) > within:
            chunk //= 2
        return chunk

    def check(self, model: Model, hp: Hparams) -> None:
        for layer in model.layers:
            check_head_dim(layer.attention.head_dim)
        check_experts(hp.expert_count, hp.expert_used_count)

    def weight_bytes(self, info: TensorInfo) -> int:
        """See `Backend.weight_bytes`: the planes of `layouts.py`, aligned."""
        return weight_bytes(info)

    def kv_bytes_per_token(self, model: Model) -> int:
        return kv_bytes_per_token((layer.attention for layer in model.layers), self.kv_type)

    def overhead_bytes(self, model: Model, hp: Hparams, max_running: int, *, drafts: bool = False) -> int:
        """Activations of a prefill batch and a decode step, slots, attention, tables, a margin."""
        specs = [layer.attention for layer in model.layers]
        qkv = max(spec.q_width + 2 * spec.kv_width for spec in specs)
        partials = max(decode_partial_bytes(spec.head_dim) for spec in specs)
        a_token = 4 * hp.embedding_length + 3 * qkv + 2 * hp.ffn_width + hp.experts_width + 2 * hp.layer_inputs_width
        a_row = 6 * a_token + 5 * hp.vocab_size + partials + ROW_BYTES
        a_slot = 5 * hp.vocab_size + SLOT_BYTES + 4 * hp.context_length // KV_BLOCK
        rows, draft_slots = rows_at_most(max_running, drafts=drafts)
        step = rows * a_row + (max_running + draft_slots) * a_slot + 24 * hp.vocab_size
        a_chunk = 9 * hp.vocab_size + 4 * hp.context_length // KV_BLOCK
        batch = 6 * self.batch_rows * a_token + chunks_at_most(max_running) * a_chunk
        return batch + step + MAX_PARTIAL_BYTES + table_bytes(specs) + bounds_bytes(len(specs)) + _MARGIN

    def available_bytes(self) -> int:
        return self._memory.free

    @contextmanager
    def uploader(self, file: GgufFile, plan: Plan, on_bytes: Callable[[int], None]) -> Iterator[backend.Upload]:
        """Asynchronous copies into one slab; compilation of the repack kernels starts first."""
        for kernel in repack_kernels(plan.weights):
            self._kernels.begin(kernel)
        pool = Pool(self._memory, plan.weight_bytes, Purpose.WEIGHTS)
        expected = sum(info.nbytes for info in plan.weights)
        upload = Upload(file, self._kernels, self._memory, pool, on_bytes, expected=expected)
        try:
            yield upload
            upload.close()
        finally:
            upload.abandon()

    def runner(
        self,
        model: Model,
        plan: Plan,
        *,
        padding_ids: Iterable[int],
        end_ids: Iterable[int],
        max_running: int = 1,
        drafts: bool = False,
    ) -> GpuRunner:
        """See `Backend.runner`: graphs are captured, which reads no weights."""
        settings = GpuSettings(
            *(plan.kv_blocks, plan.context, self.batch_rows),
            slots=max_running,
            drafts=drafts,
            kv_type=self.kv_type,
        )
        return GpuRunner(
            model, plan.hparams, self._memory, self._kernels, settings, padding_ids=padding_ids, end_ids=end_ids
        )

    def memory(self) -> MemoryUse:
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

    def numerics(self) -> dict[str, str]:
        from cupy.cuda import nvrtc  # noqa: PLC0415

        version = "{}.{}".format(*nvrtc.getVersion())
        return numerics(self._kernels.arch, version, self.kv_type, wgmma=self._kernels.wgmma)
