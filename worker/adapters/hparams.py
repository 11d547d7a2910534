"""Reads and checks GGUF metadata for the adapters: hyper-parameters and single keys.

Knows the keys that all architectures share; a key that only one architecture has is read in its
adapter.
"""

from typing import TypeVar

from worker.errors import ModelLoadFailed
from worker.gguf_file import GgufFile
from worker.model import Hparams, ModelOptions
from worker.rope import RopeScaling

T = TypeVar("T")
D = TypeVar("D")

_MAX_COUNT = 1 << 24
"""No model has that many layers, heads, tokens or features: a higher count is a broken file."""


class ArchitectureKeys:
    """The metadata keys of the file's own architecture, named without its prefix: `block_count`.

    Every method raises ModelLoadFailed, which names the key, if it is missing, of another type or
    out of range.
    """

    def __init__(self, file: GgufFile) -> None:
        self.architecture = file.architecture
        self._file = file

    def __contains__(self, key: str) -> bool:
        return self.name(key) in self._file.metadata

    def name(self, key: str) -> str:
        """The key as it is in the file."""
        return f"{self.architecture}.{key}"

    def get(self, key: str, kind: type[T], default: D) -> T | D:
        """Value of type `kind`, or `default` if the key is missing."""
        return self._file.get(self.name(key), kind, default)

    def count(self, key: str, default: int | None = None) -> int:
        """Integer from 1 to 2^24; required if there is no default."""
        name = self.name(key)
        value: int = self._file.require(name, int) if default is None else self._file.get(name, int, default)
        if not 0 < value <= _MAX_COUNT:
            raise self.error(key, f"is {value}", f"1 to {_MAX_COUNT}")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """Finite number above 0; required if there is no default."""
        name = self.name(key)
        value: float = self._file.require(name, float) if default is None else self._file.get(name, float, default)
        if not 0 < value < float("inf"):
            raise self.error(key, f"is {value}", "a positive number")
        return value

    def sliding_window(self) -> int:
        """`attention.sliding_window`, in tokens; 0 if the file has none."""
        window = self.get("attention.sliding_window", int, 0)
        if not 0 <= window <= _MAX_COUNT:
            raise self.error("attention.sliding_window", f"is {window}", f"0 to {_MAX_COUNT}")
        return window

    def error(self, key: str, problem: str, expected: str) -> ModelLoadFailed:
        """The exception for a key's value: "KEY is 0; expected 1 to 16777216"."""
        return ModelLoadFailed(f"{self.name(key)} {problem}", str(self._file.path), expected)


def read_hparams(file: GgufFile) -> Hparams:
    """Read the hyper-parameters. Raises ModelLoadFailed, which names the missing or wrong key."""
    keys = ArchitectureKeys(file)
    heads = keys.count("attention.head_count")
    width = keys.count("embedding_length")
    head_dim = keys.count("attention.key_length", default=width // heads)
    if (value_dim := keys.count("attention.value_length", default=head_dim)) != head_dim:
        raise keys.error("attention.value_length", f"is {value_dim}", str(head_dim))
    heads_kv = keys.count("attention.head_count_kv", default=heads)
    if heads % heads_kv:
        raise keys.error("attention.head_count_kv", f"is {heads_kv}", f"a divisor of the {heads} query heads")
    rope_dims = keys.count("rope.dimension_count", default=head_dim)
    if rope_dims % 2 or rope_dims > head_dim:
        raise keys.error("rope.dimension_count", f"is {rope_dims}", f"an even number up to {head_dim}")
    return Hparams(
        architecture=keys.architecture,
        block_count=keys.count("block_count"),
        embedding_length=width,
        feed_forward_length=keys.count("feed_forward_length"),
        head_count=heads,
        head_count_kv=heads_kv,
        head_dim=head_dim,
        vocab_size=_vocab_size(file),
        context_length=keys.count("context_length"),
        rms_epsilon=keys.positive("attention.layer_norm_rms_epsilon"),
        rope_freq_base=keys.positive("rope.freq_base", default=10000.0),
        rope_dims=rope_dims,
        rope_scaling=_rope_scaling(keys),
        expert_count=keys.get("expert_count", int, 0),
        expert_used_count=keys.get("expert_used_count", int, 0),
    )


def file_window(keys: ArchitectureKeys, options: ModelOptions) -> tuple[int, dict[str, str]]:
    """Window of the layers where llama.cpp applies none: 0 unless the setting is "file".

    Also the choice for the fingerprint, if the file has a window.
    """
    in_file = keys.sliding_window()
    window = in_file if options.sliding_window == "file" else 0
    return window, {"sliding_window": str(window)} if in_file else {}


def _rope_scaling(keys: ArchitectureKeys) -> RopeScaling:
    kind = keys.get("rope.scaling.type", str, "none")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise keys.error("rope.scaling.type", f"is {kind!r}", "none, linear, yarn or longrope")
    attn_factor = "rope.scaling.attn_factor"
    return RopeScaling(
        kind=kind,
        factor=keys.positive("rope.scaling.factor", default=1.0),
        original_context=keys.count("rope.scaling.original_context_length", default=keys.count("context_length")),
        attn_factor=keys.positive(attn_factor) if attn_factor in keys else None,
        beta_fast=keys.positive("rope.scaling.yarn_beta_fast", default=32.0),
        beta_slow=keys.positive("rope.scaling.yarn_beta_slow", default=1.0),
    )


def _vocab_size(file: GgufFile) -> int:
    """Rows of the embedding; the token list may be shorter, since it has no padding rows."""
    table = file.tensors.get("token_embd.weight")
    if table is None:
        raise ModelLoadFailed("no tensor token_embd.weight", str(file.path), "a model, not a vocabulary alone")
    if len(table.shape) != 2:
        raise ModelLoadFailed(f"token_embd.weight has shape {table.shape}", str(file.path), "rows of the vocabulary")
    return table.shape[0]
