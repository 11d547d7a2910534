"""The GPU's Runner: KV cache, activation pools, step state and sampler of one model, and the step as a CUDA graph.

A prompt goes through in pieces, each one graph launch, as is a lone sequence's decode step; and the next step is
launched before the last one's token is read: its inputs are on the device already. What nobody asks for is forgotten.
Knows no architecture. Next: `decode_ops.py`, `prefill_ops.py`, `state.py`, `prompt.py`, `launch.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from worker.gpu.attention import AttentionLauncher
from worker.gpu.compiler import Kernels
from worker.gpu.decode_ops import DecodeOps
from worker.gpu.graphs import captured, device_errors
from worker.gpu.kv_cache import KvCache
from worker.gpu.launch import Allocator, EarlyProducts, Launcher, dry_run
from worker.gpu.lookahead import Lookahead, Result
from worker.gpu.memory import DeviceArray, DeviceMemory, Pool, Purpose
from worker.gpu.prefill_ops import PrefillOps
from worker.gpu.prompt import PromptState
from worker.gpu.sampler import SamplerLauncher, unpack
from worker.gpu.state import PinnedRing, StepState
from worker.model import Hparams, Model, OnLaunched
from worker.ops import KV_BLOCK, Batch, Ints, Phase
from worker.sampling import Draw, DrawRequest


@dataclass(frozen=True, slots=True)
class GpuSettings:
    """What is fixed at load: KV blocks in all, and the longest sequence, the longest piece of a prompt in tokens."""

    kv_blocks: int
    context: int
    prefill_tokens: int = 1024
    """A multiple of B. Bits don't depend on it; the activations' memory does, and how long a cancellation waits."""
    sequences: int = 1
    """The most that decode together."""
    logit_rows: int = 1
    """The most rows of a piece whose logits are wanted."""


_ON_DEVICE = 3  # cudaMemcpyDeviceToDevice
_SHORT_PIECES = (32, 128, 512)
"""Tokens of the graphs that short prompts take, beside the longest piece's: blocks of absent tokens cost some time."""
_ALL_EARLY = 128  # tokens of a piece: of a longer one products alone begin early


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
        wait_for_weights: Callable[[], None] = lambda: None,
    ) -> None:
        import cupy  # noqa: PLC0415

        self.vocab_size = hp.vocab_size
        self.kv_blocks = settings.kv_blocks
        self._cupy = cupy
        self._model = model
        self._settings = settings
        self._kernels = kernels
        processors = cupy.cuda.Device().attributes["MultiProcessorCount"]
        blocks = min(settings.kv_blocks, -(-settings.context // KV_BLOCK))
        self._stream = cupy.cuda.Stream(non_blocking=True)
        with device_errors(), self._stream:
            self.cache = KvCache(memory, hp, settings.kv_blocks)
            self._attention = AttentionLauncher(memory, self.cache, settings.sequences, processors)
            self._state = StepState(memory, settings.sequences, blocks)
            self._prompt = PromptState(memory, settings.prefill_tokens, settings.logit_rows, blocks)
            slab = memory.reserve(4 * settings.logit_rows * hp.vocab_size, Purpose.WORKSPACE)
            self._logits = slab.array((settings.logit_rows, hp.vocab_size), np.float32)
            self._sampler = SamplerLauncher(
                memory, hp.vocab_size, padding_ids, end_ids, sequences=settings.sequences, processors=processors
            )
            self._results = PinnedRing(self._sampler.drawn.nbytes)
            self._pools = self._prepare(memory)
            self._step = self._capture()
            self._first = captured(lambda: self._draw(self._logits[:1]), self._stream)
            self._pieces = {tokens: self._capture_piece(tokens) for tokens in self._piece_sizes()}
            wait_for_weights()  # only here: a capture reads none
            self._stream.synchronize()
        self._ahead: Lookahead | None = None

    def run(self, batch: Batch, requests: Sequence[DrawRequest], on_launched: OnLaunched = lambda: None) -> list[Draw]:
        """See `Runner.run`."""
        ahead, self._ahead = self._ahead, None
        with device_errors(), self._stream:
            if batch.phase is Phase.PREFILL:
                return self._prefill(batch, requests, on_launched)
            if len(requests) > 1:
                return self._decode_together(batch, requests, on_launched)
            return [self._decode_one(batch, requests[0], ahead, on_launched)]

    def logits(self, batch: Batch) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The model's logits [R, V] f32, for comparisons."""
        self._ahead = None
        with device_errors(), self._stream:
            if batch.phase is Phase.PREFILL:
                rows = np.concatenate([self._host(logits) for logits in self._prefilled(batch)])
                self._stream.synchronize()  # where no row was asked for, nothing else waited for the cache
                return rows
            self._state.load(batch, [], self._stream)
            return self._host(self._decode_forward(batch))

    def _host(self, array: DeviceArray) -> np.ndarray[Any, np.dtype[np.float32]]:
        result: np.ndarray[Any, np.dtype[np.float32]] = self._cupy.asnumpy(array)
        return result

    def _prefill(self, batch: Batch, requests: Sequence[DrawRequest], on_launched: OnLaunched) -> list[Draw]:
        """The whole batch, piece by piece, with a draw from each row that was asked for before the next piece runs."""
        rows = (row[None] for logits in self._prefilled(batch, on_launched) for row in logits)
        wanted = zip(rows, batch.logit_rows, requests, strict=True)
        return [self._first_draw(batch, int(at), row, request, on_launched) for row, at, request in wanted]

    def _prefilled(self, batch: Batch, on_launched: OnLaunched = lambda: None) -> Iterator[DeviceArray]:
        """The logits [R, V] of each piece of a prompt in turn, valid until the next."""
        size = self._settings.prefill_tokens
        for start in range(0, len(batch.tokens), size):
            tokens = batch.tokens[start : start + size]
            rows = batch.logit_rows[(batch.logit_rows >= start) & (batch.logit_rows < start + size)] - start
            piece = replace(batch, tokens=tokens, positions=batch.positions[start : start + size], logit_rows=rows)
            self._prompt.load(piece, self._stream)
            self._pieces[next(most for most in self._pieces if len(tokens) <= most)].launch(self._stream)
            yield self._logits[: len(rows)]
            on_launched()  # the next piece's upload waits for this one

    def _first_draw(
        self, batch: Batch, at: int, logits: DeviceArray, request: DrawRequest, on_launched: OnLaunched
    ) -> Draw:
        """Draw after a prompt: the step state starts at its row `at`."""
        if request.forced is not None:
            return Draw(request.forced)
        row = slice(at, at + 1)
        last = _one(batch.tokens[row], batch.positions[row], batch.block_tables[0])
        self._load(last, [request])
        if len(self._logits) == 1:
            self._first.launch(self._stream)
        else:
            self._draw(logits)
        return self._read(last, request, self._fetch(), on_launched)

    def _decode_one(self, batch: Batch, request: DrawRequest, ahead: Lookahead | None, on_launched: OnLaunched) -> Draw:
        if ahead is not None and ahead.answers(batch, request):
            return self._read(batch, request, ahead.result, on_launched)
        self._load(batch, [request])
        self._step.launch(self._stream)
        if request.forced is not None:
            return Draw(request.forced)
        return self._read(batch, request, self._fetch(), on_launched)

    def _read(self, batch: Batch, request: DrawRequest, result: Result, on_launched: OnLaunched) -> Draw:
        """Launch the step after the batch, then wait for the batch's draw."""
        position = int(batch.positions[0]) + 1
        room = min(len(batch.block_tables[0]) * KV_BLOCK, self._settings.context)
        ahead = None
        if position < room:
            self._step.launch(self._stream)
            following = _one(np.zeros(1, np.int32), np.array([position], np.int32), batch.block_tables[0])
            ahead = Lookahead(following, replace(request, index=request.index + 1), self._fetch())
        on_launched()
        draw = result.draw(request)
        if ahead is not None:
            ahead.batch.tokens[0] = draw.id  # the rest was made while the device was at work
            self._ahead = ahead
        return draw

    def _decode_together(self, batch: Batch, requests: Sequence[DrawRequest], on_launched: OnLaunched) -> list[Draw]:
        """Several sequences: launched kernel by kernel, read at once."""
        self._load(batch, requests)
        self._draw(self._decode_forward(batch))
        result = self._fetch()
        on_launched()
        result.event.synchronize()
        rows = zip(result.raw.reshape(self._settings.sequences, -1), requests, strict=False)
        return [unpack(row, request) if request.forced is None else Draw(request.forced) for row, request in rows]

    def _load(self, batch: Batch, requests: Sequence[DrawRequest]) -> None:
        self._state.load(batch, requests, self._stream)
        for row, request in enumerate(requests):
            self._sampler.load(row, request, self._stream)

    def _draw(self, logits: DeviceArray) -> None:
        self._sampler.launch(self._kernels, logits, self._state)

    def _fetch(self) -> Result:
        return Result(*self._results.download(self._sampler.drawn, self._stream))

    def _decode_forward(self, batch: Batch) -> DeviceArray:
        return self._model.forward(self._decode_ops(self._kernels, self._pools[Phase.DECODE]), batch)

    def _decode_ops(self, kernels: Launcher, pool: Allocator) -> DecodeOps:
        return DecodeOps(kernels, pool, self._attention, self._state)

    def _prefill_forward(self, kernels: Launcher, pool: Allocator, tokens: int) -> DeviceArray:
        """The logits of a piece of at most `tokens` tokens, the one that the prompt's state holds."""
        batch = _piece(tokens, self._settings.logit_rows)
        return self._model.forward(PrefillOps(kernels, pool, self._attention, self._prompt), batch)

    def _prepare(self, memory: DeviceMemory) -> dict[Phase, Pool]:
        """Compile what the model needs, and reserve what its activations need, as dry runs tell."""

        def prefill(kernels: Launcher, pool: Allocator) -> None:
            for tokens in self._piece_sizes():
                self._prefill_forward(kernels, pool, tokens)

        def decode(kernels: Launcher, pool: Allocator) -> None:
            logits = self._model.forward(self._decode_ops(kernels, pool), self._largest_step())
            self._sampler.launch(kernels, logits, self._state)

        begin = self._kernels.begin  # they load beside the dry runs
        needs = {Phase.PREFILL: dry_run(prefill, begin), Phase.DECODE: dry_run(decode, begin)}
        self._kernels.prepare(name for need in needs.values() for name in need.kernels)
        # First fit may pack the arrays of fewer sequences a little worse than those of the most.
        sizes = {phase: need.pool_bytes + need.pool_bytes // 8 for phase, need in needs.items()}
        return {phase: Pool(memory, size, Purpose.ACTIVATIONS) for phase, size in sizes.items()}

    def _capture(self) -> Any:
        """The decode step of one sequence, sampler included, as a graph over the step state."""
        zero = np.zeros(1, np.int32)
        batch = _one(zero, zero, zero)

        return captured(lambda: self._draw(self._decode_forward(batch)), self._stream)

    def _piece_sizes(self) -> list[int]:
        """The lengths that pieces are captured at, rising: a shorter one takes the next, which moves no bit."""
        longest = self._settings.prefill_tokens
        return [*(tokens for tokens in _SHORT_PIECES if tokens < longest), longest]

    def _capture_piece(self, tokens: int) -> Any:
        """A piece of at most `tokens` tokens as a graph over the prompt's state."""
        kernels = self._kernels if tokens <= _ALL_EARLY else EarlyProducts(self._kernels)

        def piece() -> None:
            logits = self._prefill_forward(kernels, self._pools[Phase.PREFILL], tokens)
            copy = self._cupy.cuda.runtime.memcpyAsync
            copy(self._logits.data.ptr, logits.data.ptr, logits.nbytes, _ON_DEVICE, self._stream.ptr)

        return captured(piece, self._stream)

    def _largest_step(self) -> Batch:
        zeros = np.zeros(self._settings.sequences, np.int32)
        tables = (np.zeros(1, np.int32),) * len(zeros)
        return Batch(Phase.DECODE, zeros, zeros, tables, np.arange(len(zeros), dtype=np.int32))


def _one(token: Ints, position: Ints, table: Ints) -> Batch:
    """A decode step of one sequence."""
    return Batch(Phase.DECODE, token, position, (table,), np.zeros(1, np.int32))


def _piece(tokens: int, logit_rows: int) -> Batch:
    """The shape of a piece of a prompt."""
    zeros = np.zeros(tokens, np.int32)
    return Batch(Phase.PREFILL, zeros, zeros, (np.zeros(1, np.int32),), np.zeros(logit_rows, np.int32))
