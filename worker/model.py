"""Interface between models and the engine: hyper-parameters, `Model` and `Runner`.

A `Model` turns a batch into logits by calling ops (`worker/adapters/`). A `Runner` owns one device
with one model on it (`worker/cpu/runner.py`, `worker/gpu/runner.py`; `worker/echo.py` has no
model). Next: `worker/ops.py` for the shapes, `worker/engine/engine.py` for the caller.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from worker.ops import Array, Attention, Batch, Ops
from worker.rope import RopeScaling
from worker.sampling import Draw, DrawRequest


@dataclass(frozen=True, slots=True)
class Hparams:
    """The shape of a model, with the names of GGUF metadata; read by `worker/adapters/hparams.py`.

    Holds the keys that all architectures share. An adapter reads the others itself.
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

    @property
    def q_width(self) -> int:
        """H·D, the width of all query heads; not necessarily d."""
        return self.head_count * self.head_dim

    @property
    def kv_width(self) -> int:
        """Hk·D, the width of all KV heads."""
        return self.head_count_kv * self.head_dim

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of one token's K and V over all layers."""
        return 2 * self.block_count * self.kv_width * element_bytes


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


OnLaunched = Callable[[], None]
"""Called after the kernels are enqueued and before the first synchronization."""


class Runner(Protocol):
    """One device with one model: its KV storage, its ops of both phases and its sampler.

    * Running a batch twice leaves the same state and returns the same draws: a failed step can be
      repeated.
    * A runner may compute ahead of the requested batch if no result depends on it.
    * K and V before the batch's first position are not written: other sequences may share the
    blocks.
    """

    vocab_size: int
    kv_blocks: int

    def run(self, batch: Batch, requests: Sequence[DrawRequest], on_launched: OnLaunched = lambda: None) -> list[Draw]:
        """Compute the batch and draw one token for each of its `logit_rows`.

        `on_launched` is called before the first wait for the device (on the CPU before the
        computation), possibly more than once, and not at all if the runner does not wait.

        Raises:
            VramOom: An allocation fails.
            CudaError: The device is lost.
        """
