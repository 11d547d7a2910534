"""The GPU's model runner: prepare, capture CUDA graphs, run steps, launch one step ahead.

- Prepare (`_prepare`): dry runs determine the kernels to compile and the bytes of the activation
  pools.
- Capture (`_capture_decode`, `_capture_chunk`): one graph for the decode step of a single sequence,
  the sampler included, and one per chunk size for prompts.
- Run (`run`): a prompt runs in chunks, one graph launch each; a decode step of one sequence is one
  graph launch; several sequences are launched kernel by kernel.
- Lookahead (`_read`): the next decode step is launched before the token of the last one is read,
  since its inputs are already on the device. It is discarded if the next call is for another step.

Independent of the model's architecture. Next: `decode_ops.py`, `prefill_ops.py`, `state.py`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from worker.gpu.attention import AttentionLauncher
from worker.gpu.compiler import Kernels
from worker.gpu.decode_ops import DecodeOps
from worker.gpu.kernel import capture_graph, device_errors
from worker.gpu.launch import Allocator, Launcher, PdlInMatmulOnly, dry_run
from worker.gpu.memory import DeviceArray, DeviceMemory, Pool, Purpose
from worker.gpu.prefill_ops import PrefillOps
from worker.gpu.sampler import SamplerLauncher, unpack
from worker.gpu.state import ChunkState, KvCache, PinnedRing, StepState
from worker.model import Hparams, Model, OnLaunched
from worker.ops import KV_BLOCK, Batch, Ints, Phase
from worker.sampling import Draw, DrawRequest

_ON_DEVICE = 3  # cudaMemcpyDeviceToDevice
_SHORT_CHUNKS = (32, 128, 512)
"""Graph sizes in tokens below the longest chunk: blocks of absent tokens cost some time."""
_ALL_PDL_TOKENS = 128  # up to this many tokens of a chunk, all kernels launch with PDL


@dataclass(frozen=True, slots=True)
class GpuSettings:
    """Sizes fixed at load: total KV blocks, longest sequence and longest chunk in tokens."""

    kv_blocks: int
    context: int
    prefill_tokens: int = 1024
    """A multiple of B.

    It changes no bit, but the activation memory and the time a cancellation waits.
    """
    sequences: int = 1
    """Maximum number of sequences in a decode step."""
    logit_rows: int = 1
    """Maximum number of rows of a chunk whose logits are requested."""


@dataclass(frozen=True, slots=True)
class PendingDraw:
    """A draw that is being copied to the host: `raw` is valid once `event` has completed."""

    raw: np.ndarray[Any, Any]
    event: Any

    def wait(self, request: DrawRequest) -> Draw:
        """Wait for the copy and return the draw."""
        self.event.synchronize()
        return unpack(self.raw, request)


@dataclass(frozen=True, slots=True)
class Lookahead:
    """A decode step launched before its call, and the batch and request that the call must have."""

    batch: Batch
    request: DrawRequest
    draw: PendingDraw

    def matches(self, batch: Batch, request: DrawRequest) -> bool:
        """Whether a call is for this step: the next token of the same sequence, drawn the same way.

        A sequence has one list of generated ids for its whole life, so its identity identifies the
        sequence.
        """
        return (
            request.generated is self.request.generated
            and request.sampling == self.request.sampling
            and request.index == self.request.index
            and request.forced is None
            and np.array_equal(batch.tokens, self.batch.tokens)
            and np.array_equal(batch.positions, self.batch.positions)
            and np.array_equal(batch.block_tables[0], self.batch.block_tables[0])
        )


class GpuRunner:
    """`worker.model.Runner` on one NVIDIA GPU."""

    def __init__(
        self,
        model: Model,
        hp: Hparams,
        memory: DeviceMemory,
        kernels: Kernels,
        settings: GpuSettings,
        *,
        padding_ids: Iterable[int] = (),
        end_ids: Iterable[int] = (),
    ) -> None:
        import cupy  # noqa: PLC0415

        self.vocab_size = hp.vocab_size
        self.kv_blocks = settings.kv_blocks
        self._cupy = cupy
        self._model = model
        self._settings = settings
        self._kernels = kernels
        self._lookahead: Lookahead | None = None
        processors = cupy.cuda.Device().attributes["MultiProcessorCount"]
        blocks = min(settings.kv_blocks, -(-settings.context // KV_BLOCK))
        self._stream = cupy.cuda.Stream(non_blocking=True)
        with device_errors(), self._stream:
            self.cache = KvCache(memory, hp, settings.kv_blocks)
            self._attention = AttentionLauncher(memory, self.cache, settings.sequences, processors)
            self._state = StepState(memory, settings.sequences, blocks)
            self._chunk = ChunkState(memory, settings.prefill_tokens, settings.logit_rows, blocks)
            slab = memory.reserve(4 * settings.logit_rows * hp.vocab_size, Purpose.WORKSPACE)
            self._logits = slab.array((settings.logit_rows, hp.vocab_size), np.float32)
            self._sampler = SamplerLauncher(
                memory, hp.vocab_size, padding_ids, end_ids, sequences=settings.sequences, processors=processors
            )
            self._draws = PinnedRing(self._sampler.drawn.nbytes)
            self._pools = self._prepare(memory)
            self._decode_graph = self._capture_decode()
            self._draw_graph = capture_graph(lambda: self._draw(self._logits[:1]), self._stream)
            self._chunk_graphs = {tokens: self._capture_chunk(tokens) for tokens in self._chunk_sizes()}
            self._stream.synchronize()

    def run(self, batch: Batch, requests: Sequence[DrawRequest], on_launched: OnLaunched = lambda: None) -> list[Draw]:
        lookahead, self._lookahead = self._lookahead, None
        with device_errors(), self._stream:
            if batch.phase is Phase.PREFILL:
                return self._prefill(batch, requests, on_launched)
            if len(requests) > 1:
                return self._decode_batch(batch, requests, on_launched)
            return [self._decode_one(batch, requests[0], lookahead, on_launched)]

    def logits(self, batch: Batch) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The model's logits [R, V] f32, for comparisons."""
        self._lookahead = None
        with device_errors(), self._stream:
            if batch.phase is Phase.PREFILL:
                rows = np.concatenate([self._cupy.asnumpy(logits) for logits in self._run_chunks(batch)])
                self._stream.synchronize()  # without requested rows, nothing has waited for the KV writes
                return rows
            self._state.load(batch, [], self._stream)
            logits: np.ndarray[Any, np.dtype[np.float32]] = self._cupy.asnumpy(self._decode_forward(batch))
            return logits

    # Preparation and capture

    def _prepare(self, memory: DeviceMemory) -> dict[Phase, Pool]:
        """Compile the kernels and reserve the activation pools that dry runs determine."""

        def prefill(kernels: Launcher, pool: Allocator) -> None:
            for tokens in self._chunk_sizes():
                self._prefill_forward(kernels, pool, tokens)

        def decode(kernels: Launcher, pool: Allocator) -> None:
            logits = self._model.forward(self._decode_ops(kernels, pool), _empty_step(self._settings.sequences))
            self._sampler.launch(kernels, logits, self._state)

        begin = self._kernels.begin  # kernels compile while the dry runs continue
        needs = {Phase.PREFILL: dry_run(prefill, begin), Phase.DECODE: dry_run(decode, begin)}
        self._kernels.prepare(name for need in needs.values() for name in need.kernels)
        # First fit may fragment the pool slightly more with fewer sequences than with the maximum.
        sizes = {phase: need.pool_bytes + need.pool_bytes // 8 for phase, need in needs.items()}
        return {phase: Pool(memory, size, Purpose.ACTIVATIONS) for phase, size in sizes.items()}

    def _capture_decode(self) -> Any:
        """Capture the decode graph: one sequence's step over the step state, with sampler."""
        return capture_graph(lambda: self._draw(self._decode_forward(_empty_step(1))), self._stream)

    def _chunk_sizes(self) -> list[int]:
        """The captured chunk sizes, ascending; a shorter chunk uses the next one."""
        longest = self._settings.prefill_tokens
        return [*(tokens for tokens in _SHORT_CHUNKS if tokens < longest), longest]

    def _capture_chunk(self, tokens: int) -> Any:
        """Capture the graph of a chunk of at most `tokens` tokens over the chunk state."""
        kernels = self._kernels if tokens <= _ALL_PDL_TOKENS else PdlInMatmulOnly(self._kernels)

        def chunk() -> None:
            logits = self._prefill_forward(kernels, self._pools[Phase.PREFILL], tokens)
            copy = self._cupy.cuda.runtime.memcpyAsync
            copy(self._logits.data.ptr, logits.data.ptr, logits.nbytes, _ON_DEVICE, self._stream.ptr)

        return capture_graph(chunk, self._stream)

    def _prefill_forward(self, kernels: Launcher, pool: Allocator, tokens: int) -> DeviceArray:
        """The logits of the chunk in the chunk state, of at most `tokens` tokens."""
        zeros, rows = np.zeros(tokens, np.int32), np.zeros(self._settings.logit_rows, np.int32)
        batch = Batch(Phase.PREFILL, zeros, zeros, (np.zeros(1, np.int32),), rows)
        return self._model.forward(PrefillOps(kernels, pool, self._attention, self._chunk), batch)

    def _decode_forward(self, batch: Batch) -> DeviceArray:
        return self._model.forward(self._decode_ops(self._kernels, self._pools[Phase.DECODE]), batch)

    def _decode_ops(self, kernels: Launcher, pool: Allocator) -> DecodeOps:
        return DecodeOps(kernels, pool, self._attention, self._state)

    # Prefill

    def _prefill(self, batch: Batch, requests: Sequence[DrawRequest], on_launched: OnLaunched) -> list[Draw]:
        """Run the batch in chunks; draw from a chunk's rows before the next chunk runs."""
        rows = (row[None] for logits in self._run_chunks(batch, on_launched) for row in logits)
        wanted = zip(rows, batch.logit_rows, requests, strict=True)
        return [self._first_draw(batch, int(at), row, request, on_launched) for row, at, request in wanted]

    def _run_chunks(self, batch: Batch, on_launched: OnLaunched = lambda: None) -> Iterator[DeviceArray]:
        """The logits [R, V] of each chunk in turn, valid until the next one."""
        size = self._settings.prefill_tokens
        for start in range(0, len(batch.tokens), size):
            tokens = batch.tokens[start : start + size]
            rows = batch.logit_rows[(batch.logit_rows >= start) & (batch.logit_rows < start + size)] - start
            chunk = replace(batch, tokens=tokens, positions=batch.positions[start : start + size], logit_rows=rows)
            self._chunk.load(chunk, self._stream)
            self._chunk_graphs[next(size for size in self._chunk_graphs if len(tokens) <= size)].launch(self._stream)
            yield self._logits[: len(rows)]
            on_launched()  # the upload of the next chunk waits for this one

    def _first_draw(
        self, batch: Batch, at: int, logits: DeviceArray, request: DrawRequest, on_launched: OnLaunched
    ) -> Draw:
        """Draw after a prompt; the step state starts at row `at` of the batch."""
        if request.forced is not None:
            return Draw(request.forced)
        row = slice(at, at + 1)
        last = _step(batch.tokens[row], batch.positions[row], batch.block_tables[0])
        self._load(last, [request])
        if len(self._logits) == 1:
            self._draw_graph.launch(self._stream)
        else:
            self._draw(logits)
        return self._read(last, request, self._download(), on_launched)

    # Decode

    def _decode_one(
        self, batch: Batch, request: DrawRequest, lookahead: Lookahead | None, on_launched: OnLaunched
    ) -> Draw:
        if lookahead is not None and lookahead.matches(batch, request):
            return self._read(batch, request, lookahead.draw, on_launched)
        self._load(batch, [request])
        self._decode_graph.launch(self._stream)
        if request.forced is not None:
            return Draw(request.forced)
        return self._read(batch, request, self._download(), on_launched)

    def _read(self, batch: Batch, request: DrawRequest, pending: PendingDraw, on_launched: OnLaunched) -> Draw:
        """Launch the step after `batch` as the lookahead, then wait for the draw of `batch`."""
        position = int(batch.positions[0]) + 1
        capacity = min(len(batch.block_tables[0]) * KV_BLOCK, self._settings.context)
        lookahead = None
        if position < capacity:
            self._decode_graph.launch(self._stream)
            following = _step(np.zeros(1, np.int32), np.array([position], np.int32), batch.block_tables[0])
            lookahead = Lookahead(following, replace(request, index=request.index + 1), self._download())
        on_launched()
        draw = pending.wait(request)
        if lookahead is not None:
            lookahead.batch.tokens[0] = draw.id  # the rest was prepared before the wait
            self._lookahead = lookahead
        return draw

    def _decode_batch(self, batch: Batch, requests: Sequence[DrawRequest], on_launched: OnLaunched) -> list[Draw]:
        """A step of several sequences: launched kernel by kernel, read with one copy."""
        self._load(batch, requests)
        self._draw(self._decode_forward(batch))
        pending = self._download()
        on_launched()
        pending.event.synchronize()
        rows = zip(pending.raw.reshape(self._settings.sequences, -1), requests, strict=False)
        return [unpack(row, request) if request.forced is None else Draw(request.forced) for row, request in rows]

    def _load(self, batch: Batch, requests: Sequence[DrawRequest]) -> None:
        self._state.load(batch, requests, self._stream)
        for row, request in enumerate(requests):
            self._sampler.load(row, request, self._stream)

    def _draw(self, logits: DeviceArray) -> None:
        self._sampler.launch(self._kernels, logits, self._state)

    def _download(self) -> PendingDraw:
        return PendingDraw(*self._draws.download(self._sampler.drawn, self._stream))


def _step(token: Ints, position: Ints, table: Ints) -> Batch:
    """A decode step of one sequence."""
    return Batch(Phase.DECODE, token, position, (table,), np.zeros(1, np.int32))


def _empty_step(sequences: int) -> Batch:
    """The shape of a decode step."""
    zeros = np.zeros(sequences, np.int32)
    tables = (np.zeros(1, np.int32),) * sequences
    return Batch(Phase.DECODE, zeros, zeros, tables, np.arange(sequences, dtype=np.int32))
