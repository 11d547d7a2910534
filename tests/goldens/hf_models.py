"""GGUF files as Hugging Face models: configuration from the metadata, weights from `gguf.quants`.

Shares no code with the worker, so the two have no common errors. Needs torch and transformers,
which no test needs. Next: `make_goldens.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import numpy as np
import torch
import transformers

Metadata = dict[str, Any]
Weights = dict[str, np.ndarray]

CLASSES = (
    *("gemma3", "gemma4", "gpt_oss", "granite", "granitemoe", "granitemoeshared", "llama", "ministral3", "mistral"),
    *("mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3"),
)
MODULES = [import_module(f"transformers.models.{name}.modeling_{name}") for name in CLASSES]

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_sinks": "self_attn.sinks",
    "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
OTHER_NAMES = {
    "gemma3": {"ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm"},
    "gemma4": {
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
        "post_ffw_norm_1": "post_feedforward_layernorm_1",
        "post_ffw_norm_2": "post_feedforward_layernorm_2",
        "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
        "ffn_gate_inp": "router.proj",
        "layer_output_scale": "layer_scalar",
        "per_layer_token_embd": "model.embed_tokens_per_layer",
        "per_layer_model_proj": "model.per_layer_model_projection",
        "per_layer_proj_norm": "model.per_layer_projection_norm",
        "inp_gate": "per_layer_input_gate",
        "proj": "per_layer_projection",
        "post_norm": "post_per_layer_input_norm",
    },
    "gpt-oss": {"ffn_gate_inp": "mlp.router"},
    "granitemoe": {"ffn_gate_inp": "block_sparse_moe.router"},
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
}
"""Names of one architecture that `NAMES` lacks or has otherwise."""
PERMUTED = ("llama", "granite", "granitemoe", "mistral3", "smollm3")
"""Architectures whose files have the rows of q and k in the order of adjacent pairs."""


class _DoubleTorch:
    """The torch module, where float32 is float64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _float_or_double(tensor: torch.Tensor) -> torch.Tensor:
    """`Tensor.float`, which leaves float64 as it is; integers become float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Compute what transformers keeps in float32 (norms, rotations, softmax) in float64."""
    default = torch.get_default_dtype()
    with ExitStack() as stack:
        for module in (transformers.modeling_rope_utils, *MODULES):
            stack.enter_context(patch.object(module, "torch", _DoubleTorch()))
        stack.enter_context(patch.object(torch.Tensor, "float", _float_or_double))
        stack.callback(torch.set_default_dtype, default)
        torch.set_default_dtype(torch.float64)  # of quotients of integers and of Python's floats
        yield


def load(path: Path, *, window: bool = False) -> torch.nn.Module:
    """The model in `path`; `window` applies Phi-3's sliding window."""
    reader = gguf.GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    arch = metadata["general.architecture"]
    weights = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    config = CONFIGS[arch]({key.removeprefix(f"{arch}."): value for key, value in metadata.items()}, weights)
    if arch == "phi3":
        config.sliding_window = metadata["phi3.attention.sliding_window"] if window else None
    config._attn_implementation = config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    model.load_state_dict({name: torch.tensor(data) for name, data in _state(arch, config, weights)}, strict=True)
    return model


def logits(model: torch.nn.Module, prompt: np.ndarray) -> np.ndarray:
    """Logits [T, V] f64 of one forward over the whole prompt [T]."""
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(prompt.astype(np.int64))[None], use_cache=False).logits[0].numpy()


def _common(metadata: Metadata, weights: Weights) -> dict[str, Any]:
    return {
        "vocab_size": len(weights["token_embd.weight"]),
        "hidden_size": metadata["embedding_length"],
        "intermediate_size": metadata["feed_forward_length"],
        "num_hidden_layers": metadata["block_count"],
        "num_attention_heads": metadata["attention.head_count"],
        "num_key_value_heads": metadata["attention.head_count_kv"],
        "head_dim": _head_dim(metadata),
        "max_position_embeddings": metadata["context_length"],
        "rms_norm_eps": metadata["attention.layer_norm_rms_epsilon"],
        "tie_word_embeddings": "output.weight" not in weights,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": _rope(metadata),
    }


def _head_dim(metadata: Metadata) -> int:
    width: int = metadata["embedding_length"] // metadata["attention.head_count"]
    return metadata.get("attention.key_length", width)


def _rope(metadata: Metadata) -> dict[str, Any]:
    """Without scaling, linear, or YaRN with the defaults of its paper for keys that a file lacks."""
    rope = {"rope_type": "default", "rope_theta": metadata["rope.freq_base"]}
    if kind := metadata.get("rope.scaling.type"):
        rope |= {"rope_type": kind, "factor": metadata["rope.scaling.factor"]}
    if kind == "yarn":
        original = metadata.get("rope.scaling.original_context_length", metadata["context_length"])
        rope |= {
            "beta_fast": metadata.get("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": metadata.get("rope.scaling.yarn_beta_slow", 1.0),
            "original_max_position_embeddings": original,
        }
    return rope


def _mixture(metadata: Metadata) -> dict[str, Any]:
    return {"num_local_experts": metadata["expert_count"], "num_experts_per_tok": metadata["expert_used_count"]}


def _qwen2(metadata: Metadata, weights: Weights) -> transformers.Qwen2Config:
    return transformers.Qwen2Config(**_common(metadata, weights), use_sliding_window=False)


def _qwen3(metadata: Metadata, weights: Weights) -> transformers.Qwen3Config:
    return transformers.Qwen3Config(**_common(metadata, weights))


def _qwen3moe(metadata: Metadata, weights: Weights) -> transformers.Qwen3MoeConfig:
    """`norm_topk_prob`: no key of a file has it; it is true in every published configuration."""
    return transformers.Qwen3MoeConfig(
        **_common(metadata, weights),
        **_mixture(metadata),
        moe_intermediate_size=metadata["expert_feed_forward_length"],
        norm_topk_prob=True,
    )


def _phi3(metadata: Metadata, weights: Weights) -> transformers.Phi3Config:
    """HF computes LongRoPE's magnitude from the two context lengths; the file's key must agree."""
    common = _common(metadata, weights)
    original = metadata.get("rope.scaling.original_context_length", metadata["context_length"])
    if "rope_factors_long.weight" in weights:
        common["rope_parameters"] |= {
            "rope_type": "longrope",
            "long_factor": weights.pop("rope_factors_long.weight").tolist(),
            "short_factor": weights.pop("rope_factors_short.weight").tolist(),
            "original_max_position_embeddings": original,
        }
    return transformers.Phi3Config(**common, original_max_position_embeddings=original)


def _llama(metadata: Metadata, weights: Weights) -> transformers.PreTrainedConfig:
    """Llama, Mixtral where the file has experts, Mistral where it has YaRN.

    `rope_freqs` has only the divisors; HF computes them from the scaling of `llama3-rope`.
    """
    common = _common(metadata, weights)
    if "expert_count" in metadata:
        return transformers.MixtralConfig(**common, **_mixture(metadata))
    if common["rope_parameters"]["rope_type"] == "yarn":
        return transformers.MistralConfig(**common, sliding_window=None)
    if weights.pop("rope_freqs.weight", None) is not None:
        common["rope_parameters"] |= {"rope_type": "llama3", "original_max_position_embeddings": 128}
        common["rope_parameters"] |= {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    biases = {"attention_bias": "blk.0.attn_output.bias" in weights, "mlp_bias": "blk.0.ffn_up.bias" in weights}
    return transformers.LlamaConfig(**common, **biases)


def _mistral3(metadata: Metadata, weights: Weights) -> transformers.PreTrainedConfig:
    """Ministral 3. HF has no class of it with experts; without its query scale that is Mixtral."""
    if "expert_count" in metadata:
        assert not {"attention.temperature_scale", "rope.scaling.yarn_log_multiplier"} & set(metadata)
        return _llama(metadata, weights)
    common = _common(metadata, weights)
    common["rope_parameters"] |= {
        "mscale": 1.0,
        "mscale_all_dim": metadata["rope.scaling.yarn_log_multiplier"],
        "llama_4_scaling_beta": metadata["attention.temperature_scale"],
    }
    return transformers.Ministral3Config(**common)


def _smollm3(metadata: Metadata, weights: Weights) -> transformers.SmolLM3Config:
    """`no_rope_layer_interval`: no key of a file has it."""
    return transformers.SmolLM3Config(**_common(metadata, weights), no_rope_layer_interval=4)


def _granite_scales(metadata: Metadata) -> dict[str, float]:
    return {
        "embedding_multiplier": metadata["embedding_scale"],
        "attention_multiplier": metadata["attention.scale"],
        "residual_multiplier": metadata["residual_scale"],
        "logits_scaling": metadata["logit_scale"],
    }


def _granite(metadata: Metadata, weights: Weights) -> transformers.GraniteConfig:
    return transformers.GraniteConfig(**_common(metadata, weights), **_granite_scales(metadata))


def _granitemoe(metadata: Metadata, weights: Weights) -> transformers.PreTrainedConfig:
    keys = _common(metadata, weights) | _granite_scales(metadata) | _mixture(metadata)
    if shared := metadata.get("expert_shared_feed_forward_length"):
        return transformers.GraniteMoeSharedConfig(**keys, shared_intermediate_size=shared)
    return transformers.GraniteMoeConfig(**keys)


def _gemma3(metadata: Metadata, weights: Weights) -> transformers.Gemma3TextConfig:
    """27B (62 layers) scales queries by d/H, the others by the heads' width D; no key has it."""
    common = _common(metadata, weights)
    local = {"rope_type": "default", "rope_theta": metadata.get("rope.freq_base_swa", 10000.0)}
    common["rope_parameters"] = {"full_attention": common["rope_parameters"], "sliding_attention": local}
    width_per_head = metadata["embedding_length"] // metadata["attention.head_count"]
    return transformers.Gemma3TextConfig(
        **common,
        query_pre_attn_scalar=width_per_head if metadata["block_count"] == 62 else _head_dim(metadata),
        sliding_window=metadata["attention.sliding_window"],
        sliding_window_pattern=metadata.get("attention.sliding_window_pattern", 6),
    )


def _gemma4(metadata: Metadata, weights: Weights) -> transformers.Gemma4TextConfig:
    """Values are keys where a file has none. HF computes `rope_freqs` from a factor."""
    windowed, shared = metadata["attention.sliding_window_pattern"], metadata["attention.shared_kv_layers"]
    counts = metadata["attention.head_count_kv"]
    kv_heads = dict(zip(windowed, counts if isinstance(counts, list) else [counts] * len(windowed), strict=True))
    rotated = weights.pop("rope_freqs.weight") == 1
    widths = metadata["feed_forward_length"]
    common = _common(metadata, weights) | {
        "intermediate_size": widths[0] if isinstance(widths, list) else widths,
        "head_dim": metadata["attention.key_length_swa"],
        "num_key_value_heads": kv_heads[True],
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": metadata["rope.freq_base"],
                "partial_rotary_factor": float(rotated.mean()),
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": metadata["rope.freq_base_swa"]},
        },
    }
    if "expert_count" in metadata:
        common |= {
            "enable_moe_block": True,
            "num_experts": metadata["expert_count"],
            "top_k_experts": metadata["expert_used_count"],
            "moe_intermediate_size": metadata["expert_feed_forward_length"],
        }
    return transformers.Gemma4TextConfig(
        **common,
        global_head_dim=metadata["attention.key_length"],
        num_global_key_value_heads=kv_heads[False],
        attention_k_eq_v=f"blk.{windowed.index(False)}.attn_v.weight" not in weights,
        num_kv_shared_layers=shared,
        use_double_wide_mlp=shared > 0,
        vocab_size_per_layer_input=common["vocab_size"],
        layer_types=["sliding_attention" if each else "full_attention" for each in windowed],
        sliding_window=metadata["attention.sliding_window"],
        final_logit_softcapping=metadata["final_logit_softcapping"],
        hidden_size_per_layer_input=metadata["embedding_length_per_layer_input"],
    )


def _gpt_oss(metadata: Metadata, weights: Weights) -> transformers.GptOssConfig:
    common = _common(metadata, weights)
    common["rope_parameters"]["truncate"] = False
    return transformers.GptOssConfig(
        **common, **_mixture(metadata), sliding_window=metadata["attention.sliding_window"]
    )


CONFIGS = {
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "gpt-oss": _gpt_oss,
    "granite": _granite,
    "granitemoe": _granitemoe,
    "llama": _llama,
    "mistral3": _mistral3,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3moe,
    "smollm3": _smollm3,
}


def _state(arch: str, config: Any, weights: Weights) -> Iterator[tuple[str, np.ndarray]]:
    """Every weight under its Hugging Face name and in its Hugging Face layout."""
    names = NAMES | OTHER_NAMES.get(arch, {})
    if config.tie_word_embeddings:
        yield "lm_head.weight", weights["token_embd.weight"]
    for name, data in weights.items():
        *block, part, kind = name.split(".")
        if part.endswith(("_exps", "_shexp")) or kind == "scale":
            continue
        prefix = f"model.layers.{block[1]}." if block else ""
        full = prefix + names[part] + ("" if part in ("attn_sinks", "layer_output_scale") else f".{kind}")
        if arch in PERMUTED and part in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
            yield full, halves_from_pairs(data, heads)
        elif arch == "gemma3" and "norm" in part:
            yield full, data.astype(np.float64) - 1  # HF adds the 1 that files include
        else:
            yield full, data
    if "blk.0.ffn_down_exps.weight" in weights:
        for layer in range(config.num_hidden_layers):
            yield from EXPERTS.get(arch, _experts)(weights, layer)


def halves_from_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the q or k rows of a `PERMUTED` file: adjacent pairs (2i, 2i+1) to (i, i + D/2)."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _experts(weights: Weights, layer: int, block: str = "mlp") -> Iterator[tuple[str, np.ndarray]]:
    """HF stores gate above up: [E, 2f, d]."""
    source, target = f"blk.{layer}.ffn_", f"model.layers.{layer}.{block}.experts."
    gate, up = weights[f"{source}gate_exps.weight"], weights[f"{source}up_exps.weight"]
    yield f"{target}gate_up_proj", np.concatenate([gate, up], axis=1)
    yield f"{target}down_proj", weights[f"{source}down_exps.weight"]


def _granitemoe_experts(weights: Weights, layer: int) -> Iterator[tuple[str, np.ndarray]]:
    """HF stores gate above up in a shared expert too: [2s, d]."""
    yield from _experts(weights, layer, "block_sparse_moe")
    source, target = f"blk.{layer}.ffn_", f"model.layers.{layer}.shared_mlp."
    if f"{source}down_shexp.weight" in weights:
        gate, up = weights[f"{source}gate_shexp.weight"], weights[f"{source}up_shexp.weight"]
        yield f"{target}input_linear.weight", np.concatenate([gate, up])
        yield f"{target}output_linear.weight", weights[f"{source}down_shexp.weight"]


def _gemma4_experts(weights: Weights, layer: int) -> Iterator[tuple[str, np.ndarray]]:
    source, target = f"blk.{layer}.ffn_", f"model.layers.{layer}."
    yield f"{target}router.scale", weights[f"{source}gate_inp.scale"]
    yield f"{target}router.per_expert_scale", weights[f"{source}down_exps.scale"]
    yield f"{target}experts.gate_up_proj", weights[f"{source}gate_up_exps.weight"]
    yield f"{target}experts.down_proj", weights[f"{source}down_exps.weight"]


def _gpt_oss_experts(weights: Weights, layer: int) -> Iterator[tuple[str, np.ndarray]]:
    """HF stores experts as [E, in, out]: gate in the even columns, up in the odd ones."""
    source, target = f"blk.{layer}.ffn_", f"model.layers.{layer}.mlp.experts."
    for kind, suffix in (("weight", ""), ("bias", "_bias")):
        gate, up = weights[f"{source}gate_exps.{kind}"], weights[f"{source}up_exps.{kind}"]  # [E, f, d] or [E, f]
        both = np.stack([gate, up], axis=2).reshape(len(gate), -1, *gate.shape[2:])
        down = weights[f"{source}down_exps.{kind}"]
        yield f"{target}gate_up_proj{suffix}", both.swapaxes(1, 2) if kind == "weight" else both
        yield f"{target}down_proj{suffix}", down.swapaxes(1, 2) if kind == "weight" else down


EXPERTS: dict[str, Callable[[Weights, int], Iterator[tuple[str, np.ndarray]]]]
EXPERTS = {"gemma4": _gemma4_experts, "gpt-oss": _gpt_oss_experts, "granitemoe": _granitemoe_experts}
