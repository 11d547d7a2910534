"""A model's shape, read from its GGUF metadata and checked before anything is bound.

Knows the metadata keys that all architectures share; what only one has is read in that one's adapter.
"""

from __future__ import annotations

from worker.errors import ModelLoadFailed
from worker.gguf_file import GgufFile
from worker.model import Hparams, RopeScaling

_LARGEST = 1 << 24
"""No count of layers, heads, tokens or features comes near it: a larger one is a broken file."""


def read_hparams(file: GgufFile) -> Hparams:
    """The file's hyper-parameters. Raises ModelLoadFailed naming the key that is missing, of another type or absurd."""
    arch = file.architecture
    heads = _count(file, f"{arch}.attention.head_count")
    width = _count(file, f"{arch}.embedding_length")
    head_dim = _count(file, f"{arch}.attention.key_length", default=width // heads)
    _expect(
        file,
        f"{arch}.attention.value_length",
        _count(file, f"{arch}.attention.value_length", default=head_dim),
        head_dim,
    )
    heads_kv = _count(file, f"{arch}.attention.head_count_kv", default=heads)
    if heads % heads_kv:
        raise ModelLoadFailed(
            f"{heads} query heads over {heads_kv} KV heads",
            f"{arch}.attention.head_count_kv",
            "a divisor of head_count",
        )
    feed_forward = _count(file, f"{arch}.feed_forward_length")
    rope_dims = _count(file, f"{arch}.rope.dimension_count", default=head_dim)
    if rope_dims % 2 or rope_dims > head_dim:
        raise ModelLoadFailed(
            f"{rope_dims} rotary dimensions", f"{arch}.rope.dimension_count", f"an even number up to {head_dim}"
        )
    return Hparams(
        architecture=arch,
        block_count=_count(file, f"{arch}.block_count"),
        embedding_length=width,
        feed_forward_length=feed_forward,
        head_count=heads,
        head_count_kv=heads_kv,
        head_dim=head_dim,
        vocab_size=_vocab_size(file),
        context_length=_count(file, f"{arch}.context_length"),
        rms_epsilon=_positive(file, f"{arch}.attention.layer_norm_rms_epsilon"),
        rope_freq_base=_positive(file, f"{arch}.rope.freq_base", default=10000.0),
        rope_dims=rope_dims,
        rope_scaling=_rope_scaling(file),
        sliding_window=file.get(f"{arch}.attention.sliding_window", int, 0),
        expert_count=file.get(f"{arch}.expert_count", int, 0),
        expert_used_count=file.get(f"{arch}.expert_used_count", int, 0),
        expert_feed_forward_length=_count(file, f"{arch}.expert_feed_forward_length", default=feed_forward),
    )


def _rope_scaling(file: GgufFile) -> RopeScaling:
    prefix = f"{file.architecture}.rope.scaling"
    kind = file.get(f"{prefix}.type", str, "none")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise ModelLoadFailed(f"{prefix}.type is {kind!r}", str(file.path), "none, linear, yarn or longrope")
    return RopeScaling(
        kind=kind,
        factor=_positive(file, f"{prefix}.factor", default=1.0),
        original_context=_count(
            file, f"{prefix}.original_context_length", default=_count(file, f"{file.architecture}.context_length")
        ),
        attn_factor=_positive(file, f"{prefix}.attn_factor") if f"{prefix}.attn_factor" in file.metadata else None,
        beta_fast=_positive(file, f"{prefix}.yarn_beta_fast", default=32.0),
        beta_slow=_positive(file, f"{prefix}.yarn_beta_slow", default=1.0),
    )


def _vocab_size(file: GgufFile) -> int:
    """Rows of the embedding: padding rows count too, so the tensor says it and the token list may be shorter."""
    table = file.tensors.get("token_embd.weight")
    if table is None:
        raise ModelLoadFailed("no tensor token_embd.weight", str(file.path), "a model, not a vocabulary alone")
    if len(table.shape) != 2:
        raise ModelLoadFailed(f"token_embd.weight has shape {table.shape}", str(file.path), "rows of the vocabulary")
    return table.shape[0]


def _count(file: GgufFile, key: str, default: int | None = None) -> int:
    value: int = file.require(key, int) if default is None else file.get(key, int, default)
    if not 0 < value <= _LARGEST:
        raise ModelLoadFailed(f"{key} is {value}", str(file.path), f"1 to {_LARGEST}")
    return value


def _positive(file: GgufFile, key: str, default: float | None = None) -> float:
    value: float = file.require(key, float) if default is None else file.get(key, float, default)
    if not 0 < value < float("inf"):
        raise ModelLoadFailed(f"{key} is {value}", str(file.path), "a positive number")
    return value


def _expect(file: GgufFile, key: str, value: int, expected: int) -> None:
    if value != expected:
        raise ModelLoadFailed(f"{key} is {value}", str(file.path), str(expected))
