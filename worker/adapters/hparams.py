"""Reads the hyper-parameters and RoPE keys that all architectures share from GGUF metadata.

A key that only one architecture has is read in its adapter. Next: `keys.py`, for the keys that
nothing reads.
"""

import math
from typing import Any

import numpy as np

from worker.adapters.keys import ArchitectureKeys, shown_value
from worker.errors import ModelLoadFailed
from worker.gguf_file import GgufFile
from worker.model import Hparams, ModelOptions
from worker.rope import RopeScaling

_SOFTMAX, _SOFTMAX_OF_CHOSEN = 1, 3
"""Values of `expert_gating_func`; normalized over the chosen experts, both are the same."""
_EXPERT_WIDTH = "expert_feed_forward_length"
LAYERS_DIFFER = ("gemma4",)
"""Architectures whose adapters read the numbers of KV heads and the FFN widths of each layer."""
DENSE_BESIDE_EXPERTS = ("gemma4",)
"""Architectures whose `feed_forward_length` is the width of a dense FFN beside the experts."""


def read_hparams(file: GgufFile, keys: ArchitectureKeys | None = None) -> Hparams:
    """Read the hyper-parameters. Raises ModelLoadFailed, which names the missing or wrong key."""
    keys = keys or ArchitectureKeys(file)
    layers = keys.count("block_count")
    heads = keys.count_of_layers("attention.head_count", layers)
    width = keys.count("embedding_length")
    head_dim = keys.count("attention.key_length", default=width // heads)
    if (value_dim := keys.count("attention.value_length", default=head_dim)) != head_dim:
        raise keys.error("attention.value_length", f"is {value_dim}", str(head_dim))
    heads_kv = _largest_count(keys, "attention.head_count_kv", layers, default=heads)
    if heads % heads_kv:
        raise keys.error("attention.head_count_kv", f"is {heads_kv}", f"a divisor of the {heads} query heads")
    rope_dims = keys.count("rope.dimension_count", default=head_dim)
    if rope_dims % 2 or rope_dims > head_dim:
        raise keys.error("rope.dimension_count", f"is {rope_dims}", f"an even number up to {head_dim}")
    experts = keys.width("expert_count")
    # Not with `keys`: check_rest must refuse the width if the adapter does not read it.
    shared = ArchitectureKeys(file).width("expert_shared_feed_forward_length")
    ffn = _largest_count(keys, "feed_forward_length", layers)
    if experts and keys.architecture in DENSE_BESIDE_EXPERTS:
        shared = ffn
    return Hparams(
        architecture=keys.architecture,
        block_count=layers,
        embedding_length=width,
        feed_forward_length=ffn,
        head_count=heads,
        head_count_kv=heads_kv,
        head_dim=head_dim,
        vocab_size=_vocab_size(file),
        context_length=keys.count("context_length"),
        rms_epsilon=keys.positive("attention.layer_norm_rms_epsilon"),
        rope_freq_base=keys.positive("rope.freq_base", default=10000.0),
        rope_dims=rope_dims,
        rope_scaling=_rope_scaling(keys),
        expert_count=experts,
        expert_used_count=keys.width("expert_used_count"),
        expert_feed_forward_length=keys.count(_EXPERT_WIDTH) if experts and _EXPERT_WIDTH in keys else 0,
        expert_shared_feed_forward_length=shared,
        layer_input_length=ArchitectureKeys(file).width("embedding_length_per_layer_input"),
    )


def _largest_count(keys: ArchitectureKeys, key: str, layers: int, default: int | None = None) -> int:
    """The number of all layers, or the largest if the architecture's layers may differ."""
    if keys.architecture in LAYERS_DIFFER:
        return max(keys.counts_of_layers(key, layers, default))
    return keys.count_of_layers(key, layers, default)


def neutral_values(hp: Hparams) -> dict[str, tuple[Any, ...]]:
    """Values of keys that change nothing for a file of these hyper-parameters.

    `Meta AI original pth` is the order of q and k rows that all files of `llama` have.
    """
    layout = {"tensor_data_layout": ("Meta AI original pth",)} if hp.architecture == "llama" else {}
    gating = (0, _SOFTMAX_OF_CHOSEN) if hp.architecture == "gpt-oss" else (0, _SOFTMAX, _SOFTMAX_OF_CHOSEN)
    experts = {"expert_gating_func": gating, "expert_weights_norm": (True,)} if hp.expert_count else {}
    # Gemma 4's scores are not scaled.
    score_scale = 1.0 if hp.architecture == "gemma4" else 1 / math.sqrt(hp.head_dim)
    return {
        **layout,
        **experts,
        "attention.key_length_swa": (hp.head_dim,),
        "attention.scale": (0.0, score_scale),
        "attention.value_length_swa": (hp.head_dim,),
        "rope.dimension_count_swa": (hp.rope_dims,),
        "rope.freq_base_swa": (hp.rope_freq_base,),
    }


def dense_window(keys: ArchitectureKeys, options: ModelOptions) -> tuple[int, dict[str, str]]:
    """Window of the layers of a model that llama.cpp runs without one, and its load-time choice.

    0, unless the setting is "file". Raises ModelLoadFailed for a window that would be ignored: one
    below the context, in a file that is not of Phi-3.
    """
    in_file = keys.sliding_window()
    window = in_file if options.sliding_window == "file" else 0
    if not window and 0 < in_file < options.context and keys.architecture != "phi3":
        problem = f"is {in_file}, less than the context of {options.context}"
        expected = f'a model.context of at most {in_file}, or model.sliding_window = "file", which applies the window'
        raise keys.error("attention.sliding_window", problem, expected)
    return window, {"sliding_window": str(window)} if in_file else {}


def windowed_layers(hp: Hparams, keys: ArchitectureKeys, *, period: int | None) -> list[bool]:
    """Whether each layer has a window: a bool, 0 or 1 for each, or all but the last of every `n`.

    `period`: the n of a file without the key; None if the file must have the flags.
    """
    name = "attention.sliding_window_pattern"
    flags = keys.value(name)
    expected = f"{hp.block_count} bools" if period is None else f"a number, or {hp.block_count} bools"
    if isinstance(flags, np.ndarray):
        if len(flags) != hp.block_count or flags.dtype.kind not in "biu" or not np.isin(flags, (0, 1)).all():
            raise keys.error(name, f"is {shown_value(flags)}", expected)
        return [bool(flag) for flag in flags]
    if period is None:
        raise keys.error(name, "is missing" if flags is None else f"is {shown_value(flags)}", expected)
    period = keys.count(name, default=period)
    return [i % period < period - 1 for i in range(hp.block_count)]


def require_experts(hp: Hparams, keys: ArchitectureKeys) -> None:
    """Raise ModelLoadFailed unless the file is a mixture of experts of which some are used."""
    if not 0 < hp.expert_used_count <= hp.expert_count:
        raise keys.error("expert_used_count", f"is {hp.expert_used_count}", f"1 to {hp.expert_count} experts")


def refuse_experts(hp: Hparams, keys: ArchitectureKeys) -> None:
    """Raise ModelLoadFailed if the file is a mixture of experts, for adapters without experts."""
    for key, value in (("expert_count", hp.expert_count), ("expert_used_count", hp.expert_used_count)):
        if value:
            raise keys.error(key, f"is {value}", f"0: {hp.architecture} models are served without experts")


def _rope_scaling(keys: ArchitectureKeys) -> RopeScaling:
    """Read the `rope.scaling.*` keys as llama.cpp does: without a type, a factor is linear."""
    kind = keys.get("rope.scaling.type", str, "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise keys.error("rope.scaling.type", f"is {kind!r}", "none, linear, yarn or longrope")
    old = keys.get("rope.scale_linear", float, 0.0)  # read where the newer key is absent
    factor = keys.get("rope.scaling.factor", float, old)
    if factor < 0:
        raise keys.error("rope.scaling.factor", f"is {factor}", "0 for no scaling, or a positive number")
    original = keys.get("rope.scaling.original_context_length", int, 0)
    return RopeScaling(
        kind=kind,
        factor=1.0 if factor == 0 or kind == "none" else factor,
        original_context=original if original > 0 else keys.count("context_length"),
        attn_factor=keys.positive("rope.scaling.attn_factor", default=1.0),
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
