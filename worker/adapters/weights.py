"""A file's tensors for an adapter: checked by name and shape, claimed once, uploaded.

A model is bound twice: with `describe`, which uploads nothing, to check the file before any device
work, and then with the backend's upload. Knows no architecture and no device.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from worker.backend import Upload
from worker.errors import ModelLoadFailed
from worker.gguf_file import GgufFile, TensorInfo
from worker.ops import Attention, Linear, QTensor, RmsNorm
from worker.quants import dequantize


def describe(info: TensorInfo) -> QTensor:
    """An upload without data, for checking names and shapes."""
    return QTensor(info.name, info.shape, info.kind, None)


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """Weights of one layer with a dense FFN; some architectures have biases on q, k and v."""

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


class Weights:
    """The tensors of a file by name and expected shape. Shapes are row-major: [rows, cols]."""

    def __init__(self, file: GgufFile, upload: Upload) -> None:
        self._file = file
        self._upload = upload
        self._claimed: set[str] = set()

    def has(self, name: str) -> bool:
        """Whether the file has the tensor."""
        return name in self._file.tensors

    def tensor(self, name: str, *shape: int) -> QTensor:
        """Claim a tensor. Raises ModelLoadFailed if it is missing, claimed or of another shape."""
        info = self._file.tensors.get(name)
        expected = f"{name} of shape {list(shape)}"
        if info is None:
            raise ModelLoadFailed(f"tensor {name} is missing", str(self._file.path), expected)
        if info.shape != shape:
            raise ModelLoadFailed(f"tensor {name} has shape {list(info.shape)}", str(self._file.path), expected)
        if name in self._claimed:
            raise ModelLoadFailed(f"tensor {name} is claimed twice", str(self._file.path), "one use of each tensor")
        self._claimed.add(name)
        return self._upload(info)

    def vector(self, name: str, n: int) -> QTensor:
        """Claim a bias, norm weight or sinks [n]. Raises ModelLoadFailed if it is quantized."""
        vector = self.tensor(name, n)
        if vector.kind.block_size != 1:
            problem = f"vector {name} is of type {vector.kind.name}"
            raise ModelLoadFailed(problem, str(self._file.path), "F32, F16 or BF16")
        return vector

    def host_vector(self, name: str, n: int) -> npt.NDArray[np.float64]:
        """Claim a vector [n] that loading reads on the host, such as frequency divisors, as f64."""
        self.vector(name, n)
        info = self._file.tensors[name]
        return dequantize(self._file.data(info), info.kind).reshape(n).astype(np.float64)

    def norm(self, name: str, d: int, eps: float) -> RmsNorm:
        """`name`.weight [d]."""
        return RmsNorm(self.vector(f"{name}.weight", d), eps)

    def linear(self, name: str, rows: int, cols: int, *, bias: bool = False) -> Linear:
        """`name`.weight [rows, cols] and, with `bias`, `name`.bias [rows]."""
        weight = self.tensor(f"{name}.weight", rows, cols)
        return Linear(weight, self.vector(f"{name}.bias", rows) if bias else None)

    def experts(self, name: str, experts: int, rows: int, cols: int) -> Linear:
        """`name`.weight [E, rows, cols] and `name`.bias [E, rows]."""
        return Linear(self.tensor(f"{name}.weight", experts, rows, cols), self.tensor(f"{name}.bias", experts, rows))

    def output(self, embedding: QTensor) -> Linear:
        """The output head: `output.weight` [V, d], or the embedding if the file ties them."""
        return self.linear("output", *embedding.shape) if self.has("output.weight") else Linear(embedding)

    def unused(self) -> list[str]:
        """Names of unclaimed tensors, in the file's order."""
        return [name for name in self._file.tensors if name not in self._claimed]

    def claimed(self) -> Iterable[TensorInfo]:
        """Claimed tensors, in the file's order."""
        return (info for name, info in self._file.tensors.items() if name in self._claimed)
