"""Seam 2: what a model is to the engine. Real ones stand in `worker/adapters/`; `worker/echo.py` is the simple side.

A Model turns a batch into logits by calling ops; a Runner owns one device with one model on it. Knows no file format
and no device. Read `worker/ops.py` for the shapes and `worker/engine/engine.py` for the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from worker.ops import Array, Batch, Ops
from worker.sampling import Draw, DrawRequest


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How a file stretches its rotary frequencies; `original_context` is the length before it."""

    kind: str = "none"
    """none, linear, yarn or longrope."""
    factor: float = 1.0
    original_context: int = 0
    attn_factor: float | None = None
    """Multiplies cos and sin where the file states it."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True, slots=True)
class Hparams:
    """A model's shape, named as in GGUF metadata; read and checked by `worker/adapters/hparams.py`."""

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
    sliding_window: int = 0
    expert_count: int = 0
    expert_used_count: int = 0
    expert_feed_forward_length: int = 0

    @property
    def q_width(self) -> int:
        """H·D: the width of all query heads; not always d."""
        return self.head_count * self.head_dim

    @property
    def kv_width(self) -> int:
        """Hk·D: the width of all KV heads."""
        return self.head_count_kv * self.head_dim

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of K and V that one token takes over all layers."""
        return 2 * self.block_count * self.kv_width * element_bytes


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """What is fixed at load and does not stand in the file."""

    context: int
    """The longest sequence served, in tokens: the least of the file's, the setting's and the KV pool's."""
    phi3_window: bool = False
    """Apply Phi-3's `attention.sliding_window`, as HF does; llama.cpp does not."""


class Model(Protocol):
    """One architecture with its weights bound."""

    def forward(self, ops: Ops, batch: Batch) -> Array:
        """Logits [R, V] f32 of the rows that the batch asks for; the KV cache is written through the ops."""
        ...


OnLaunched = Callable[[], None]
"""Called when a step's work is on its way to the device: what is left is to wait, and that needs no Python."""


class Runner(Protocol):
    """One device with one model: its KV storage, its two sets of ops and its sampler.

    Running the same batch twice leaves the same state and gives the same draws, so a failed step can be repeated.
    A runner may compute ahead of what it was asked for, as long as nobody can tell. It never writes K or V before the
    batch's first position: the blocks there may be other sequences' too.
    """

    vocab_size: int
    kv_blocks: int

    def run(self, batch: Batch, requests: Sequence[DrawRequest], on_launched: OnLaunched = lambda: None) -> list[Draw]:
        """Compute the batch and draw one token for each of its `logit_rows`.

        `on_launched` is called before the first wait for the device, or before the host computes where it does; perhaps
        more than once, and not at all where nothing is waited for.

        Raises VramOom when an allocation fails, CudaError when the device is lost.
        """
        ...
