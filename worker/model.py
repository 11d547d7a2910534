"""Interface between models and the engine: hyper-parameters, `Model` and `Runner`.

A `Model` turns a batch into logits by calling ops (`worker/adapters/`). A `Runner` owns one device
with one model on it (`worker/cpu/runner.py`, `worker/gpu/runner.py`; `worker/echo.py` has no
model). Next: `worker/ops.py` for the shapes, `worker/engine/engine.py` for the caller.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np

from worker.errors import InvalidRequest
from worker.ops import Array, Attention, Batch, Ints, Ops, Phase
from worker.rope import RopeScaling
from worker.sampling import Draw, Sampling


@dataclass(frozen=True, slots=True)
class Hparams:
    """The shape of a model, with the names of GGUF metadata; read by `worker/adapters/hparams.py`.

    Holds the keys that all architectures share. An adapter reads the others itself. Where layers
    differ, `feed_forward_length` and `head_count_kv` are the largest; `Model.layers` has them all.
    """

    architecture: str
    block_count: int
    embedding_length: int
    feed_forward_length: int
    head_count: int
    head_count_kv: int
    head_dim: int
    vocab_size: int
    context_length: int
    rms_epsilon: float
    rope_freq_base: float
    rope_dims: int
    rope_scaling: RopeScaling
    expert_count: int = 0
    expert_used_count: int = 0
    expert_feed_forward_length: int = 0
    """Width of an expert's FFN; 0 if the file does not name it apart from `feed_forward_length`."""
    expert_shared_feed_forward_length: int = 0
    """Width of the dense FFN beside the experts; 0 without one."""

    layer_input_length: int = 0
    """P, elements of a token's input to each layer beside the residual; 0 without one."""

    @property
    def layer_inputs_width(self) -> int:
        """Elements of a token's inputs to all layers: layers·P."""
        return self.block_count * self.layer_input_length

    @property
    def ffn_width(self) -> int:
        """Elements of a token's widest FFN between up and down: f; or k·f of its experts, or s."""
        if not self.expert_count:
            return self.feed_forward_length
        routed = self.expert_used_count * (self.expert_feed_forward_length or self.feed_forward_length)
        return max(routed, self.expert_shared_feed_forward_length)

    @property
    def experts_width(self) -> int:
        """Elements of the results of a token's experts before their sum: k·d; 0 without any."""
        return self.expert_used_count * self.embedding_length if self.expert_count else 0

    @property
    def q_width(self) -> int:
        """H·D, the width of all query heads; not necessarily d."""
        return self.head_count * self.head_dim

    @property
    def kv_width(self) -> int:
        """Hk·D, the width of all KV heads."""
        return self.head_count_kv * self.head_dim


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Settings that an adapter applies. They are fixed at load and never depend on free memory."""

    context: int
    """Configured context, in tokens: the file's, or the setting's if that is lower."""
    sliding_window: Literal["auto", "file"] = "auto"
    """The setting `model.sliding_window`: windows as in llama.cpp, or always the file's."""


class Layer(Protocol):
    """The part of a layer that is visible outside its adapter."""

    @property
    def attention(self) -> Attention:
        """Parameters of the layer's attention."""


class Model(Protocol):
    """One architecture with its weights bound."""

    @property
    def choices(self) -> Mapping[str, str]:
        """Load-time choices that change results; part of the model's fingerprint."""

    @property
    def layers(self) -> Sequence[Layer]:
        """The layers, in order."""

    def forward(self, ops: Ops, batch: Batch) -> Array:
        """Logits [R, V] f32 of the batch's `logit_rows`; the ops write the KV cache."""


def cached(layers: Iterable[Attention]) -> list[Attention]:
    """The layers that have keys and values of their own."""
    return [spec for spec in layers if not spec.reads_only]


KvType = Literal["f32", "f16", "q8"]
"""How keys and values are stored; q8: codes of 8 bits, a scale for each key or value of a head."""


def kv_row_bytes(dim: int, kv_type: KvType) -> int:
    """Bytes of one key or value of a head of D elements."""
    return {"f32": 4 * dim, "f16": 2 * dim, "q8": dim + 2}[kv_type]


def kv_bytes_per_token(layers: Iterable[Attention], kv_type: KvType) -> int:
    """Bytes of one token's K and V over all layers."""
    return sum(2 * spec.n_kv_heads * kv_row_bytes(spec.head_dim, kv_type) for spec in cached(layers))


LEAST_DRAFT_ROWS = 4
"""Rows of the smallest decode step with draft tokens."""
MAX_DRAFT_ROWS = 8
"""Rows of the largest one: more rows take too long for what they draw."""

OnLaunched = Callable[[], None]
"""Called after the kernels are enqueued and before the first synchronization."""


@dataclass(frozen=True, slots=True)
class SlotStart:
    """What generation in a slot needs besides the KV blocks; given once, with the last chunk."""

    slot: int
    prompt: Sequence[int]
    sampling: Sampling
    end_ids: frozenset[int]
    """Ids that end the sequence: end tokens unless `ignore_eos`, and `stop_token_ids`."""
    max_tokens: int
    """Tokens that the sequence draws at most, those of `replay` included."""
    replay: Sequence[int] = ()
    """Ids that the decode path computes without a draw, from index 0 on. They are returned."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one prompt. `start`, the position of the first, is a multiple of B."""

    tokens: Ints
    start: int
    block_table: Ints
    """The KV blocks of positions 0, B, 2B, …; with `begin` also of the slot, until `extend`."""
    begin: SlotStart | None = None
    """Set on a prompt's last chunk: draw from its last row, and generate from now on."""

    def batch(self) -> Batch:
        """The batch of the chunk, with the logits of the last row if generation begins."""
        count = len(self.tokens)
        positions = np.arange(self.start, self.start + count, dtype=np.int32)
        rows = np.array([] if self.begin is None else [count - 1], np.int32)
        return Batch(Phase.PREFILL, self.tokens, positions, (self.block_table,), rows)


class SlotDraw(NamedTuple):
    """The next token of the sequence in a slot."""

    slot: int
    draw: Draw | InvalidRequest | None
    """None: no token can be drawn, since the logits are not finite. An error: the grammar's mask
    allows no token, or its matcher has failed. In both cases the slot has stopped."""


@dataclass(frozen=True, slots=True)
class DraftSupport:
    """How a runner verifies draft tokens, and what that costs."""

    lookahead: int
    """Decode steps whose draws are not yet returned when `run` returns: 0 or 1."""
    step_times: Mapping[int, float]
    """Estimated time of a decode step by its number of rows, relative to a step of one row. Steps
    have these sizes; fewer rows take as long as the next size."""
    draft_time: float
    """Time that verification adds to a step, in the same unit."""

    def spare_rows(self, sequences: int, *, largest: bool = False) -> int:
        """Draft tokens of a step of `sequences` sequences at most.

        They fill the step's size, which is at least LEAST_DRAFT_ROWS rows, or the largest one.
        """
        if sequences > MAX_DRAFT_ROWS:
            return 0
        return (MAX_DRAFT_ROWS if largest else max(LEAST_DRAFT_ROWS, self._size(sequences))) - sequences

    def cost(self, sequences: int, drafts: int) -> float:
        """Tokens that a step would draw in the time that `drafts` draft tokens add to it."""
        without = self.step_times[self._size(sequences)]
        with_drafts = self.step_times[self._size(max(LEAST_DRAFT_ROWS, sequences + drafts))] + self.draft_time
        return (with_drafts / without - 1) * sequences

    def _size(self, rows: int) -> int:
        return min(size for size in self.step_times if size >= rows)


class StepWait(NamedTuple):
    """A wait for the device, by `time.monotonic`."""

    began_at: float
    ended_at: float


class Runner(Protocol):
    """One device with one model: its KV storage, its ops of both phases and its sampler.

    Sequences generate in slots 0 … `slots` - 1. A slot runs from a chunk's `begin` until the device
    draws one of its `end_ids` or its `max_tokens`-th token, or until `stop`. If `sampling` has a
    grammar, each draw that is not one of `replay` is from the ids that its mask allows; an error of
    the mask stops the slot. A runner may compute one decode step ahead. K and V before a chunk's
    first position are not written: other sequences may share the blocks. After `stop` the caller
    uses the slot and its blocks again in the next `run`, whose launches therefore follow all
    earlier ones.
    """

    vocab_size: int
    kv_blocks: int
    slots: int
    step_wait: StepWait | None
    """The wait of the last `run` for the draws of a decode step, if the device has another one to
    compute and both were launched alone: without chunks, masks and draft tokens. Else None, and
    always if the runner does not compute ahead."""
    drafts: DraftSupport | None
    """None: `propose` is not supported."""

    def run(self, chunks: Sequence[Chunk], on_launched: OnLaunched = lambda: None) -> list[SlotDraw]:
        """Compute the chunks, then one decode step of the running slots; return draws in order.

        A runner may compute chunks of several prompts together. That changes no bit of a prompt.

        A runner that computes ahead returns the draws of all launches but its newest decode step,
        which the next call returns; that step includes the slots that begin. It may leave the first
        draws of those slots to `first_draws`. Another runner computes the slots that ran before the
        call. So both return at most one draw of a slot, and one more for each draft token that was
        accepted, and for a first draw that `first_draws` was not called for.

        `on_launched` is called before the first wait for the device (on the CPU before the
        computation), possibly more than once, and not at all if the runner does not wait.

        Raises:
            VramOom: An allocation fails.
            CudaError: The device is lost.
        """

    def first_draws(self) -> list[SlotDraw]:
        """Wait for the first draws that the last `run` has not returned, and return them.

        They are computed later than the others, whose readers need not wait for them. Without this
        call the next `run` waits for them before it launches anything. Raises as `run` does.
        """

    def extend(self, slot: int, block_table: Ints) -> None:
        """Replace the block table of a running slot by a longer one that begins with it.

        It applies from the next `run` on. A call of `run` after which n tokens of a slot have been
        returned writes K and V of at most n tokens after the prompt, and of `max_tokens`; the
        caller extends the table before. Draft tokens count as returned when they are proposed.
        """

    def propose(self, slot: int, draft: Sequence[int]) -> None:
        """Let the decode step of the next `run` verify draft tokens of a slot.

        They may follow the token that the preceding decode step draws, returned or not. The step
        computes a row for that token and for each draft token, and draws from all of them. A draft
        token that equals the draw before it is accepted, if all before it are; the draws up to the
        one after the last accepted token are returned. So every draw is the one without drafts.

        The slot has no ids of `replay` left and no grammar, and all slots together have at most
        `drafts.spare_rows` draft tokens. Does nothing if the slot has ended on the device.
        """

    def stop(self, slot: int) -> None:
        """End generation in a slot and drop its draws that were not returned. Idempotent."""

    def reset(self) -> None:
        """After an exception of `run`: stop all slots, drop what was launched. Raises nothing."""
