"""The GPU's model runner: prepare, capture CUDA graphs, run chunks and decode steps.

- Prepare (`_prepare`): dry runs determine the kernels to compile and the bytes of the activation
  pools.
- Capture (`_capture_decode`, `_capture_prefill`): one graph for decode steps of 1, 2, 4, 8, … rows,
  the sampler included, and one per size of a prefill batch.
- Run (`run`): a batch of chunks (`prefill_state.py`) is one graph launch, the first draws of its
  prompts another. A decode step of all slots that generate is one graph launch; its inputs are
  already on the device. With draft tokens (`drafts.py`) it has graphs of its own, and its rows are
  uploaded.
- Lookahead: the newest decode step is read by the next call, after that call has launched another.
  First draws of prompts are read later than the draws of the step before their chunks.
- Grammars (`masks.py`): a decode step leaves rows that need a mask undrawn. While the device runs
  it, the host reads the step before, computes the masks and launches a second graph that draws.

Independent of the model's architecture. Next: `slots.py`, `state.py`, `decode_ops.py`,
`prefill_ops.py`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from worker.gpu.attention import AttentionMemory
from worker.gpu.compiler import Kernels
from worker.gpu.decode_attention import DecodeAttention
from worker.gpu.decode_ops import DecodeOps
from worker.gpu.drafts import DRAFT_SLOTS, DraftLauncher
from worker.gpu.glu_bounds import GluBounds
from worker.gpu.kernel import capture_graph, device_errors
from worker.gpu.launch import Allocator, Launcher, PdlInMatmulOnly, dry_run
from worker.gpu.memory import DeviceArray, DeviceMemory, Pool, Purpose
from worker.gpu.prefill_attention import PrefillAttention
from worker.gpu.prefill_ops import PrefillOps
from worker.gpu.prefill_state import PrefillState, chunks_at_most, pack
from worker.gpu.sampler import SamplerLauncher
from worker.gpu.slots import Generation, Launch, Slots
from worker.gpu.state import PINNED_SLOTS, KvCache, PinnedRing, StepState, rows_of
from worker.model import (
    LEAST_DRAFT_ROWS,
    MAX_DRAFT_ROWS,
    Chunk,
    DraftSupport,
    Hparams,
    KvType,
    Model,
    OnLaunched,
    SlotDraw,
    SlotStart,
    StepWait,
)
from worker.ops import KV_BLOCK, Batch, Ints, Phase
from worker.sampling import DrawRequest
from worker.token_masks import SlotMask

_ON_DEVICE = 3  # cudaMemcpyDeviceToDevice
_SMALL_BATCHES = (32, 128, 512, 1024, 2048)
"""Graph sizes in rows below the largest batch: blocks of absent rows cost some time."""
_ALL_PDL_ROWS = 128  # up to this many rows of a batch, all kernels launch with PDL
_ROWS_AT_LOAD = 4  # decode steps of more rows are captured at their first use
_DRAFT_STEPS = (LEAST_DRAFT_ROWS, MAX_DRAFT_ROWS)
"""Rows of the decode steps with draft tokens; both are captured at load."""
_STEP_TIMES = {1: 1.0, 2: 1.2, 4: 1.5, 8: 1.9}
_EXPERT_STEP_TIMES = {1: 1.0, 2: 1.4, 4: 2.0, 8: 3.0}
"""Times of decode steps by rows, relative to one row (docs/notes/batching.md): of dense models with
4 rows measured; of experts with 4 and 8 rows derived from measured steps of 1 and 8 rows and
measured products of 4 and 8 rows; the others estimated."""
_DRAFT_TIME = 0.13
"""Copies of slots, keys and values before attention, and acceptance, in the same unit."""


@dataclass(frozen=True, slots=True)
class GpuSettings:
    """Sizes fixed at load: total KV blocks, longest sequence in tokens, rows of a prefill batch."""

    kv_blocks: int
    context: int
    prefill_tokens: int = 1024
    """A multiple of B.

    It changes no bit, but the activation memory and the time a cancellation waits.
    """
    slots: int = 1
    """Sequences that generate at once."""
    logit_rows: int = 1
    """Maximum number of rows whose logits a call of `logits` requests of a prefill batch."""
    drafts: bool = False
    """Whether decode steps may have draft tokens."""
    kv_type: KvType = "f16"


@dataclass(frozen=True, slots=True)
class _DecodeStep:
    """The graphs of a decode step, and the rows of `drawn` that they write."""

    graph: Any
    """The step with all draws that need no mask."""
    masked_draws: Any
    """The other draws, from the logits that `graph` has left."""
    drawn: DeviceArray


@dataclass(frozen=True, slots=True)
class _LaunchedStep:
    """A decode step whose graph is launched: its sequences, and the draft tokens of each."""

    step: _DecodeStep
    rows: tuple[Generation, ...]
    number: int
    drafts: tuple[Sequence[int], ...] = ()

    def masks(self) -> dict[int, SlotMask]:
        """The masks of the step's draws, by row, once all draws before it are read."""
        masks: dict[int, SlotMask] = {}
        row = 0
        for generation, draft in zip(self.rows, self.drafts or ((),) * len(self.rows), strict=True):
            if generation.live and generation.mask is not None and generation.mask.due:
                masks[row] = generation.mask
            row += 1 + len(draft)
        return masks


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
        self.slots = settings.slots
        self._chunks = chunks_at_most(settings.slots)
        self._slots = Slots(settings.slots)
        self._bounds_launched = False
        self._lookahead: Launch | None = None
        self._first_draws_due: list[Launch] = []
        self._launched_alone = False
        """Whether the last call has launched a decode step and nothing else."""
        self.step_wait: StepWait | None = None
        device = cupy.cuda.Device().attributes
        processors, self._max_shared = device["MultiProcessorCount"], device["MaxSharedMemoryPerBlockOptin"]
        blocks = min(settings.kv_blocks, -(-settings.context // KV_BLOCK))
        rows, draft_slots = rows_at_most(settings.slots, drafts=settings.drafts)
        times = _EXPERT_STEP_TIMES if hp.expert_count else _STEP_TIMES
        self.drafts = DraftSupport(1, times, _DRAFT_TIME) if settings.drafts else None
        self._stream = cupy.cuda.Stream(non_blocking=True)
        with device_errors(), self._stream:
            layers = [layer.attention for layer in model.layers]
            self.cache = KvCache(memory, layers, settings.kv_blocks, settings.kv_type)
            attention = AttentionMemory(memory, self.cache)
            self._prefill_attention = PrefillAttention(attention, processors)
            self._glu_bounds = GluBounds(memory, len(model.layers))
            self._decode_attention = DecodeAttention(attention, rows, processors, self._max_shared)
            self._state = StepState(memory, settings.slots, blocks, draft_slots, self._chunks)
            logit_rows = max(settings.logit_rows, self._chunks)
            self._prefill_state = PrefillState(memory, settings.prefill_tokens, logit_rows, blocks, self._chunks)
            slab = memory.reserve(4 * logit_rows * hp.vocab_size, Purpose.WORKSPACE)
            self._logits = slab.array((logit_rows, hp.vocab_size), np.float32)
            self._sampler = SamplerLauncher(
                *(memory, hp.vocab_size, padding_ids, end_ids),
                sequences=settings.slots + draft_slots,
                processors=processors,
                max_shared=self._max_shared,
                rows=rows,
                masked=settings.slots,
            )
            self._draft_rows = (
                DraftLauncher(memory, self._state, self._sampler, processors) if settings.drafts else None
            )
            self._draws = PinnedRing(self._sampler.drawn.nbytes)
            self._first_draw_ring = PinnedRing(self._sampler.drawn[: self._chunks].nbytes, settings.slots)
            self._pools = self._prepare(memory)
            at_load = [rows for rows in self._step_sizes() if rows <= _ROWS_AT_LOAD]
            self._decode_steps = {rows: self._capture_decode(rows) for rows in at_load}
            self._draft_steps: dict[int, _DecodeStep] = {}
            if self._draft_rows is not None:
                self._copy_slots = self._capture_copies(self._draft_rows)
                self._draft_steps = {rows: self._capture_draft_step(self._draft_rows, rows) for rows in _DRAFT_STEPS}
            self._first_draw_steps = {rows: self._capture_first_draws(rows) for rows in (1, self._chunks)}
            self._prefill_graphs = {rows: self._capture_prefill(rows) for rows in self._batch_sizes()}
            self._stream.synchronize()

    def run(self, chunks: Sequence[Chunk], on_launched: OnLaunched = lambda: None) -> list[SlotDraw]:
        draws = self.first_draws()
        with device_errors(), self._stream:
            if chunks:
                self._prefill_state.wait()  # the host is at most one call ahead: a cancellation waits for no more
            launches = [] if self._lookahead is None else [self._lookahead]
            self._lookahead = None
            first_draws = self._prefill(chunks, on_launched)
            drafts = self._slots.take_drafts()
            step, masked = None, False
            if self._slots.step_is_due:
                step = self._decode_drafts(drafts) if drafts else self._decode()
                masked = self._slots.masked_in_step()
                if not masked:
                    self._lookahead = self._download(step)
            on_launched()
            if launches and not masked:  # the others' tokens are complete before the chunks are
                self._first_draws_due = first_draws
            else:
                launches += first_draws
            alone = step is not None and not (chunks or drafts or masked)
            was_alone, self._launched_alone = self._launched_alone, alone
            self.step_wait = launches[0].timed_wait() if launches and alone and was_alone else None
            draws += self._read(launches)
            if step is not None and masked:
                self._draw_masked(step)
                self._lookahead = self._download(step)
            return draws + self._slots.take_failed()

    def first_draws(self) -> list[SlotDraw]:
        launches, self._first_draws_due = self._first_draws_due, []
        if not launches:
            return []
        with device_errors(), self._stream:
            return self._read(launches) + self._slots.take_failed()

    def extend(self, slot: int, block_table: Ints) -> None:
        if self._slots.extend(slot, block_table):
            with device_errors(), self._stream:
                self._state.extend(slot, block_table, self._stream)

    def propose(self, slot: int, draft: Sequence[int]) -> None:
        self._slots.propose(slot, draft)

    def stop(self, slot: int) -> None:
        self._slots.stop(slot)

    def reset(self) -> None:
        self._slots.clear()
        self._lookahead, self._first_draws_due = None, []
        self._launched_alone, self.step_wait = False, None

    def logits(self, batch: Batch) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The model's logits [R, V] f32, for comparisons; stops all slots."""
        self.reset()
        with device_errors(), self._stream:
            if batch.phase is Phase.PREFILL:
                parts = pack([batch], self._settings.prefill_tokens, self._chunks)
                rows = np.concatenate([self._cupy.asnumpy(self._compute(part)) for part in parts])
                self._stream.synchronize()  # without requested rows, nothing has waited for the KV writes
                return rows
            self._state.load(batch, [], self._stream)
            logits: np.ndarray[Any, np.dtype[np.float32]] = self._cupy.asnumpy(self._decode_forward(batch))
            return logits

    # Preparation and capture

    def _prepare(self, memory: DeviceMemory) -> dict[Phase, Pool]:
        """Compile the kernels and reserve the activation pools that dry runs determine."""

        def prefill(kernels: Launcher, pool: Allocator) -> None:
            for rows in self._batch_sizes():
                self._prefill_forward(kernels, pool, rows)
            self._glu_bounds.launch(kernels)

        def decode(kernels: Launcher, pool: Allocator) -> None:
            for rows in self._step_sizes():
                logits = self._model.forward(self._decode_ops(kernels, pool), _empty_step(rows))
                for masked in (False, True):
                    self._draw(kernels, logits, masked=masked)
            if self._draft_rows is not None:
                self._draft_rows.copy_slots(kernels)
                for rows in _DRAFT_STEPS:
                    self._draft_step(kernels, pool, self._draft_rows, rows)

        begin = self._kernels.begin  # kernels compile while the dry runs continue
        forwards = {Phase.PREFILL: prefill, Phase.DECODE: decode}
        needs = {phase: dry_run(forward, begin, wgmma=self._kernels.wgmma) for phase, forward in forwards.items()}
        self._kernels.prepare(name for need in needs.values() for name in need.kernels)
        # First fit may fragment the pool slightly more with fewer sequences than with the maximum.
        sizes = {phase: need.pool_bytes + need.pool_bytes // 8 for phase, need in needs.items()}
        return {phase: Pool(memory, size, Purpose.ACTIVATIONS) for phase, size in sizes.items()}

    def _step_sizes(self) -> list[int]:
        """Rows of the decode graphs, ascending: powers of two; fewer rows use the next one."""
        return [1 << n for n in range(rows_of(self.slots).bit_length())]

    def _capture_decode(self, rows: int) -> _DecodeStep:
        """Capture a decode step of at most `rows` rows over the step state, with sampler."""

        def step() -> DeviceArray:
            logits = self._decode_forward(_empty_step(rows))
            self._draw(self._kernels, logits)
            return logits

        return self._captured(step, self._state, rows)

    def _capture_draft_step(self, drafts: DraftLauncher, rows: int) -> _DecodeStep:
        """Capture a decode step with draft tokens of at most `rows` rows, with their acceptance."""

        def step() -> DeviceArray:
            return self._draft_step(self._kernels, self._pools[Phase.DECODE], drafts, rows)

        return self._captured(step, drafts.state, rows)

    def _draft_step(self, kernels: Launcher, pool: Allocator, drafts: DraftLauncher, rows: int) -> DeviceArray:
        ops = DecodeOps(kernels, pool, self._decode_attention, drafts.state, self._max_shared, drafts=True)
        logits = self._model.forward(ops, _empty_step(rows))
        self._sampler.launch(kernels, logits, drafts.state, drafts.state.row_slots[:rows])
        drafts.accept(kernels, rows)
        return logits

    def _captured(self, step: Callable[[], DeviceArray], state: StepState, rows: int) -> _DecodeStep:
        """Capture a step, which returns its logits, and the draws from them that need masks."""
        logits: list[DeviceArray] = []
        graph = capture_graph(lambda: logits.append(step()), self._stream)
        draws = capture_graph(
            lambda: self._sampler.launch(self._kernels, logits[0], state, state.slots_of_rows(rows), masked=True),
            self._stream,
        )
        return _DecodeStep(graph, draws, self._sampler.drawn[:rows])

    def _capture_copies(self, drafts: DraftLauncher) -> Any:
        """Capture the copies of slots, which a step with draft tokens requires before its graph."""
        return capture_graph(lambda: drafts.copy_slots(self._kernels), self._stream)

    def _capture_first_draws(self, rows: int) -> _DecodeStep:
        """Capture the draws from the first `rows` rows of a prefill batch's logits."""
        slots = self._state.first_rows[:rows] if self.slots > 1 else None
        draw = partial(self._sampler.launch, self._kernels, self._logits[:rows], self._state, slots)
        graph, masked_draws = (capture_graph(partial(draw, masked=masked), self._stream) for masked in (False, True))
        return _DecodeStep(graph, masked_draws, self._sampler.drawn[:rows])

    def _batch_sizes(self) -> list[int]:
        """Rows of the graphs of prefill batches, ascending; fewer rows use the next one."""
        largest = self._settings.prefill_tokens
        return [*(rows for rows in _SMALL_BATCHES if rows < largest), largest]

    def _capture_prefill(self, rows: int) -> Any:
        """Capture the graph of a prefill batch of at most `rows` rows over the prefill state."""
        kernels = self._kernels if rows <= _ALL_PDL_ROWS else PdlInMatmulOnly(self._kernels)

        def batch() -> None:
            logits = self._prefill_forward(kernels, self._pools[Phase.PREFILL], rows)
            copy = self._cupy.cuda.runtime.memcpyAsync
            copy(self._logits.data.ptr, logits.data.ptr, logits.nbytes, _ON_DEVICE, self._stream.ptr)

        return capture_graph(batch, self._stream)

    def _prefill_forward(self, kernels: Launcher, pool: Allocator, rows: int) -> DeviceArray:
        """The logits of the batch in the prefill state, of at most `rows` rows."""
        zeros, logit_rows = np.zeros(rows, np.int32), np.zeros(len(self._logits), np.int32)
        batch = Batch(Phase.PREFILL, zeros, zeros, (np.zeros(1, np.int32),), logit_rows)
        ops = PrefillOps(kernels, pool, self._prefill_attention, self._glu_bounds, self._prefill_state)
        return self._model.forward(ops, batch)

    def _decode_forward(self, batch: Batch) -> DeviceArray:
        return self._model.forward(self._decode_ops(self._kernels, self._pools[Phase.DECODE]), batch)

    def _decode_ops(self, kernels: Launcher, pool: Allocator) -> DecodeOps:
        return DecodeOps(kernels, pool, self._decode_attention, self._state, self._max_shared)

    # Prefill

    def _prefill(self, chunks: Sequence[Chunk], on_launched: OnLaunched) -> list[Launch]:
        """Launch the chunks in batches, and after each the first draws of its complete prompts."""
        starts = iter([(chunk.begin, chunk.block_table) for chunk in chunks if chunk.begin is not None])
        batches = pack((chunk.batch() for chunk in chunks), self._settings.prefill_tokens, self._chunks)
        launches: list[Launch] = []
        uploads = 0
        for batch in batches:
            complete = list(islice(starts, len(self._compute(batch))))
            uploads += 1 + len(complete)
            if uploads >= PINNED_SLOTS:
                on_launched()  # from here on, uploads may wait
            if complete:
                launches += self._begin(complete)
        return launches

    def _compute(self, batch: Sequence[Batch]) -> DeviceArray:
        """Launch a batch of chunks: the requested rows of logits, valid until the next one."""
        if not self._bounds_launched:  # here since at load the weights are still being uploaded
            self._glu_bounds.launch(self._kernels)
            self._bounds_launched = True
        self._prefill_state.load(batch, self._stream)
        graphs, rows = self._prefill_graphs, self._prefill_state.loaded
        graphs[next(size for size in graphs if rows <= size)].launch(self._stream)
        return self._logits[: sum(len(chunk.logit_rows) for chunk in batch)]

    def _begin(self, starts: Sequence[tuple[SlotStart, Ints]]) -> list[Launch]:
        """Upload slots and launch their first draws, from the rows of logits of the last batch.

        A slot whose mask has an error fails and draws nothing.
        """
        masks = [self._sampler.slot_masks.start(start) for start, _ in starts]
        due = {row: mask for row, mask in enumerate(masks) if mask is not None and mask.due}
        if due:
            self._sampler.masks.load(due, self._stream)
        generations: list[Generation] = []
        row_slots: list[int] = []
        for (start, table), mask in zip(starts, masks, strict=True):
            generations.append(self._slots.begin(start, table, mask))
            if mask is not None and mask.error is not None:
                self._slots.fail(start.slot, mask.error)
                row_slots.append(-1)
                continue
            self._state.start(start, table, self._stream)
            self._sampler.load(start.slot, DrawRequest(start.sampling, 0, start.prompt, ()), self._stream)
            row_slots.append(start.slot)
        if max(row_slots) < 0:
            return []
        self._state.map_first_rows(row_slots, self._stream)
        step = next(step for rows, step in self._first_draw_steps.items() if len(starts) <= rows)
        if len(due) < len(starts):
            step.graph.launch(self._stream)
        if due:
            step.masked_draws.launch(self._stream)
        copy = self._first_draw_ring.download(step.drawn, self._stream)
        return [Launch(tuple(generations), self._slots.steps, *copy)]

    # Decode

    def _decode(self) -> _LaunchedStep:
        """Launch a decode step of all slots that generate."""
        rows, size = self._slots.rows, rows_of(len(self._slots.rows))
        if size not in self._decode_steps:
            self._decode_steps[size] = self._capture_decode(size)
        self._state.map_rows(self._slots.numbers, self._stream)
        self._upload_forced()
        number, step = self._slots.next_step(), self._decode_steps[size]
        step.graph.launch(self._stream)
        return _LaunchedStep(step, rows, number)

    def _decode_drafts(self, drafts: tuple[Sequence[int], ...]) -> _LaunchedStep:
        """Launch a decode step of all slots that generate, with draft tokens of each."""
        assert self._draft_rows is not None, "the runner was made without draft tokens"
        rows = self._slots.rows
        count = self._draft_rows.load(list(zip(self._slots.numbers, drafts, strict=True)), self._stream)
        self._upload_forced()
        number, step = self._slots.next_step(drafts), self._draft_steps[max(LEAST_DRAFT_ROWS, rows_of(count))]
        self._copy_slots.launch(self._stream)
        step.graph.launch(self._stream)
        return _LaunchedStep(step, rows, number, drafts)

    def _read(self, launches: Iterable[Launch]) -> list[SlotDraw]:
        """Wait for launches; return their draws, which the masks of their sequences follow."""
        draws = [draw for launch in launches for draw in self._slots.read(launch)]
        self._slots.accept(draws)
        return draws

    def _download(self, launched: _LaunchedStep) -> Launch:
        copy = self._draws.download(launched.step.drawn, self._stream)
        return Launch(launched.rows, launched.number, *copy, launched.drafts)

    def _draw_masked(self, launched: _LaunchedStep) -> None:
        """Compute the masks of a step and launch its draws that need them."""
        masks = launched.masks()
        if masks:
            self._sampler.masks.load(masks, self._stream)
            launched.step.masked_draws.launch(self._stream)
            self._slots.stop_failed()

    def _upload_forced(self) -> None:
        forced = self._slots.forced()
        if forced is not None:
            self._state.force(forced, self._stream)

    def _draw(self, kernels: Launcher, logits: DeviceArray, *, masked: bool = False) -> None:
        row_slots = self._state.slots_of_rows(len(logits))
        self._sampler.launch(kernels, logits, self._state, row_slots, masked=masked)


def rows_at_most(slots: int, *, drafts: bool) -> tuple[int, int]:
    """Rows of the largest decode step, and the slots of draft tokens."""
    return (max(MAX_DRAFT_ROWS, rows_of(slots)), DRAFT_SLOTS) if drafts else (rows_of(slots), 0)


def _empty_step(sequences: int) -> Batch:
    """The shape of a decode step."""
    zeros = np.zeros(sequences, np.int32)
    tables = (np.zeros(1, np.int32),) * sequences
    return Batch(Phase.DECODE, zeros, zeros, tables, np.arange(sequences, dtype=np.int32))
