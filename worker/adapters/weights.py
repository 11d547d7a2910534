"""A file's tensors for an adapter: checked by name and shape, claimed once, uploaded.

A model is bound twice: with `describe`, which uploads nothing, to check the file before any device
work, and then with the backend's upload. Knows no architecture and no device.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
import numpy.typing as npt

from worker.backend import Upload
from worker.errors import ModelLoadFailed
from worker.gguf_file import GgufFile, TensorInfo
from worker.model import Hparams
from worker.ops import Attention, Linear, QTensor, RmsNorm, Router
from worker.quants import QUANT_TYPES, dequantize

HARMLESS = re.compile(
    r"(v|mm|a|resampler)\..*|(model\.)?image_newline"  # vision and audio parts: text does not use them
    r"|.*\.attn_rot_embd\.weight|.*rotary_emb\.inv_freq"  # standard frequencies, written by converters of 2023
    r"|.*\.input_scale"  # of activations, for NVFP4 weights
)
"""Tensors that no adapter claims and that do not change the computation on text."""


class Bias(Enum):
    """Whether a projection has a bias in the file."""

    NONE = "none"
    OPTIONAL = "optional"
    REQUIRED = "required"


def describe(info: TensorInfo, scale: float = 1.0) -> QTensor:
    """An upload without data, for checking names and shapes."""
    return QTensor(info.name, info.shape, info.kind, None)


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """Weights of one layer with a dense FFN; the architecture decides which may have biases."""

    attn_norm: RmsNorm  # [d]
    q: Linear  # [H·D, d]
    k: Linear  # [Hk·D, d]
    v: Linear  # [Hk·D, d]
    attention: Attention
    attn_output: Linear  # [d, H·D]
    ffn_norm: RmsNorm  # [d]
    gate: Linear  # [f, d]
    up: Linear  # [f, d]
    down: Linear  # [d, f]


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """Weights of one layer whose FFN is a mixture of experts, without biases but for attention."""

    attn_norm: RmsNorm  # [d]
    q: Linear  # [H·D, d]
    k: Linear  # [Hk·D, d]
    v: Linear  # [Hk·D, d]
    attention: Attention
    attn_output: Linear  # [d, H·D]
    ffn_norm: RmsNorm  # [d]
    router: Router  # [E, d]
    gate: Linear  # [E, f, d]
    up: Linear  # [E, f, d]
    down: Linear  # [E, d, f]


class Weights:
    """The tensors of a file by name and expected shape. Shapes are row-major: [rows, cols]."""

    def __init__(self, file: GgufFile, upload: Upload) -> None:
        self._file = file
        self._upload = upload
        self._claimed: dict[str, tuple[TensorInfo, ...]] = {}
        """Claimed tensors, or the parts in which they are uploaded."""
        self._left_out: set[str] = set()

    def has(self, name: str) -> bool:
        """Whether the file has the tensor."""
        return name in self._file.tensors

    def tensor(self, name: str, *shape: int, scale: float = 1.0) -> QTensor:
        """Claim a tensor. Raises ModelLoadFailed if it is missing, claimed or of another shape.

        `scale` multiplies the values of a vector.
        """
        assert scale == 1.0 or len(shape) == 1, "only vectors are scaled at their upload"
        return self._upload(self._claim(name, *shape), scale)

    def _claim(self, name: str, *shape: int) -> TensorInfo:
        """Mark a tensor as claimed. Raises as `tensor` does."""
        info = self._file.tensors.get(name)
        expected = f"{name} of shape {list(shape)}"
        if info is None:
            raise ModelLoadFailed(f"tensor {name} is missing", str(self._file.path), expected)
        if info.shape != shape:
            raise ModelLoadFailed(f"tensor {name} has shape {list(info.shape)}", str(self._file.path), expected)
        if info.kind not in QUANT_TYPES:
            supported = ", ".join(kind.name for kind in QUANT_TYPES)
            problem = f"tensor {name} is of type {info.kind.name} ({info.kind.ggml_id}), which is not supported"
            raise ModelLoadFailed(problem, str(self._file.path), f"one of {supported}")
        if name in self._claimed:
            raise ModelLoadFailed(f"tensor {name} is claimed twice", str(self._file.path), "one use of each tensor")
        self._claimed[name] = (info,)
        return info

    def table(self, name: str, rows: int, cols: int) -> QTensor:
        """Claim a matrix of which only `Ops.embed` reads, rows by token ids. Raises as `tensor`."""
        info = replace(self._claim(name, rows, cols), is_table=True)
        self._claimed[name] = (info,)
        return self._upload(info)

    def leave_out(self, *names: str) -> None:
        """Accept tensors that files of the architecture may have and that it does not use."""
        self._left_out.update(names)

    def vector(self, name: str, n: int, scale: float = 1.0) -> QTensor:
        """Claim a bias, norm weight or sinks [n], times `scale`.

        Raises ModelLoadFailed if it is quantized.
        """
        vector = self.tensor(name, n, scale=scale)
        if vector.kind.block_size != 1:
            problem = f"vector {name} is of type {vector.kind.name}"
            raise ModelLoadFailed(problem, str(self._file.path), "F32, F16 or BF16")
        return vector

    def host_vector(self, name: str, n: int) -> npt.NDArray[np.float64]:
        """Claim a vector [n] that loading reads on the host, as f64.

        Raises ModelLoadFailed if a value is not finite.
        """
        self.vector(name, n)
        info = self._file.tensors[name]
        values = dequantize(self._file.data(info), info.kind).reshape(n).astype(np.float64)
        if not np.isfinite(values).all():
            raise ModelLoadFailed(f"tensor {name} has a value that is not finite", str(self._file.path), "numbers")
        return values

    def divisors(self, name: str, n: int) -> npt.NDArray[np.float64]:
        """Claim divisors [n] of RoPE's frequencies. Raises ModelLoadFailed for one not above 0."""
        values = self.host_vector(name, n)
        if not (values > 0).all():
            problem = f"tensor {name} has the value {values.min()}"
            raise ModelLoadFailed(problem, str(self._file.path), "numbers above 0, which divide frequencies")
        return values

    def norm(self, name: str, d: int, eps: float, scale: float = 1.0) -> RmsNorm:
        """`name`.weight [d], times `scale`: the norm's result is multiplied by it."""
        return RmsNorm(self.vector(f"{name}.weight", d, scale), eps)

    def linear(self, name: str, rows: int, cols: int, *, bias: Bias = Bias.NONE) -> Linear:
        """`name`.weight [rows, cols] and, as `bias` says, `name`.bias [rows]."""
        weight = self.tensor(f"{name}.weight", rows, cols)
        has_bias = bias is Bias.REQUIRED or (bias is Bias.OPTIONAL and self.has(f"{name}.bias"))
        return Linear(weight, self.vector(f"{name}.bias", rows) if has_bias else None)

    def qkv(self, block: str, hp: Hparams, *, fused: bool = False) -> tuple[Linear, Linear, Linear]:
        """q, k and v of a layer, of three tensors or a fused one; biases are optional.

        `fused`: the form that the architecture's files usually have.
        """
        d, q, kv = hp.embedding_length, hp.q_width, hp.kv_width
        if self.has(f"{block}.attn_qkv.weight") or (fused and not self.has(f"{block}.attn_q.weight")):
            whole = self.linear(f"{block}.attn_qkv", q + 2 * kv, d, bias=Bias.OPTIONAL)
            return whole.rows(0, q), whole.rows(q, q + kv), whole.rows(q + kv, q + 2 * kv)
        parts = (("attn_q", q), ("attn_k", kv), ("attn_v", kv))
        query, key, value = (self.linear(f"{block}.{name}", rows, d, bias=Bias.OPTIONAL) for name, rows in parts)
        return query, key, value

    def experts(self, name: str, experts: int, rows: int, cols: int, *, bias: Bias = Bias.NONE) -> Linear:
        """`name`.weight [E, rows, cols] and, as `bias` says, `name`.bias [E, rows]."""
        weight = self.tensor(f"{name}.weight", experts, rows, cols)
        has_bias = bias is Bias.REQUIRED or (bias is Bias.OPTIONAL and self.has(f"{name}.bias"))
        return Linear(weight, self.tensor(f"{name}.bias", experts, rows) if has_bias else None)

    def experts_gate_up(self, block: str, experts: int, rows: int, cols: int) -> tuple[Linear, Linear]:
        """Gate and up [E, rows, cols] of a layer's experts, of two tensors or one, gate first."""
        fused = f"{block}.ffn_gate_up_exps.weight"
        if not self.has(fused):
            gate, up = (self.experts(f"{block}.ffn_{part}_exps", experts, rows, cols) for part in ("gate", "up"))
            return gate, up
        whole = self._claim(fused, experts, 2 * rows, cols)
        halves = self._claimed[fused] = whole.part(0, rows), whole.part(rows, 2 * rows)
        gate, up = (Linear(self._upload(half)) for half in halves)
        return gate, up

    def output(self, embedding: QTensor, *, biased: bool = False) -> Linear:
        """The output head: `output.weight` [V, d], or the embedding if the file ties them.

        `biased`: `output.bias` [V] is added to the logits if the file has it.
        """
        weight = self.tensor("output.weight", *embedding.shape) if self.has("output.weight") else embedding
        bias = self.vector("output.bias", embedding.shape[0]) if biased and self.has("output.bias") else None
        return Linear(weight, bias)

    def unused(self) -> list[str]:
        """Names of unclaimed tensors, in the file's order.

        Raises ModelLoadFailed for one that may change the computation: `HARMLESS` has no match, and
        the adapter has not left it out.
        """
        unclaimed = [name for name in self._file.tensors if name not in self._claimed]
        for name in unclaimed:
            if name not in self._left_out and not HARMLESS.fullmatch(name):
                problem = f"tensor {name!r} has no place in a model of architecture {self._file.architecture}"
                raise ModelLoadFailed(problem, str(self._file.path), "only tensors that the architecture uses")
        return unclaimed

    def claimed(self) -> Iterable[TensorInfo]:
        """Claimed tensors, or the parts in which they are uploaded, in the file's order."""
        return (info for name in self._file.tensors for info in self._claimed.get(name, ()))
