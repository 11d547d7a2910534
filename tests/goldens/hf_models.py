"""GGUF files as Hugging Face models: configuration from the metadata, weights from `gguf.quants`.

Shares no code with the worker, so the two have no common errors. Needs torch and transformers,
which no test needs. Next: `make_goldens.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import numpy as np
import torch
import transformers
from transformers import modeling_rope_utils
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen2 import modeling_qwen2

Weights = dict[str, np.ndarray]
MODULES = (modeling_rope_utils, modeling_gpt_oss, modeling_llama, modeling_phi3, modeling_qwen2)

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_sinks": "self_attn.sinks",
    "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.router",
}


class _DoubleTorch:
    """The torch module, where float32 is float64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Compute what transformers keeps in float32 (norms, rotations, softmax) in float64."""
    with ExitStack() as stack:
        for module in MODULES:
            stack.enter_context(patch.object(module, "torch", _DoubleTorch()))
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


def _common(metadata: dict[str, Any], weights: Weights) -> dict[str, Any]:
    return {
        "vocab_size": len(weights["token_embd.weight"]),
        "hidden_size": metadata["embedding_length"],
        "intermediate_size": metadata["feed_forward_length"],
        "num_hidden_layers": metadata["block_count"],
        "num_attention_heads": metadata["attention.head_count"],
        "num_key_value_heads": metadata["attention.head_count_kv"],
        "max_position_embeddings": metadata["context_length"],
        "rms_norm_eps": metadata["attention.layer_norm_rms_epsilon"],
        "tie_word_embeddings": "output.weight" not in weights,
        "pad_token_id": None,
        "eos_token_id": None,
    }


def _qwen2(metadata: dict[str, Any], weights: Weights) -> transformers.Qwen2Config:
    rope = {"rope_type": "default", "rope_theta": metadata["rope.freq_base"]}
    return transformers.Qwen2Config(**_common(metadata, weights), rope_parameters=rope, use_sliding_window=False)


def _phi3(metadata: dict[str, Any], weights: Weights) -> transformers.Phi3Config:
    """HF computes LongRoPE's magnitude from the two context lengths; the file's key must agree."""
    rope = {"rope_type": "default", "rope_theta": metadata["rope.freq_base"]}
    original = metadata.get("rope.scaling.original_context_length", metadata["context_length"])
    if "rope_factors_long.weight" in weights:
        rope |= {
            "rope_type": "longrope",
            "long_factor": weights.pop("rope_factors_long.weight").tolist(),
            "short_factor": weights.pop("rope_factors_short.weight").tolist(),
            "original_max_position_embeddings": original,
        }
    return transformers.Phi3Config(
        **_common(metadata, weights), rope_parameters=rope, original_max_position_embeddings=original
    )


def _llama(metadata: dict[str, Any], weights: Weights) -> transformers.LlamaConfig:
    """`rope_freqs` has only the divisors; HF computes them from the scaling of `llama3-rope`."""
    rope = {"rope_type": "default", "rope_theta": metadata["rope.freq_base"]}
    if weights.pop("rope_freqs.weight", None) is not None:
        rope |= {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"original_max_position_embeddings": 128}
    return transformers.LlamaConfig(**_common(metadata, weights), rope_parameters=rope)


def _gpt_oss(metadata: dict[str, Any], weights: Weights) -> transformers.GptOssConfig:
    rope = {
        "rope_type": metadata["rope.scaling.type"],
        "rope_theta": metadata["rope.freq_base"],
        "factor": metadata["rope.scaling.factor"],
        "beta_fast": metadata.get("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": metadata.get("rope.scaling.yarn_beta_slow", 1.0),
        "original_max_position_embeddings": metadata.get(
            "rope.scaling.original_context_length", metadata["context_length"]
        ),
        "truncate": False,
    }
    return transformers.GptOssConfig(
        **_common(metadata, weights),
        head_dim=metadata["attention.key_length"],
        sliding_window=metadata["attention.sliding_window"],
        num_local_experts=metadata["expert_count"],
        num_experts_per_tok=metadata["expert_used_count"],
        rope_parameters=rope,
    )


CONFIGS = {"qwen2": _qwen2, "phi3": _phi3, "llama": _llama, "gpt-oss": _gpt_oss}


def _state(arch: str, config: Any, weights: Weights) -> Iterator[tuple[str, np.ndarray]]:
    """Every weight under its Hugging Face name and in its Hugging Face layout."""
    if config.tie_word_embeddings:
        yield "lm_head.weight", weights["token_embd.weight"]
    for name, data in weights.items():
        *block, part, kind = name.split(".")
        if "_exps" in part:
            continue
        target = "mlp.gate_up_proj" if (arch, part) == ("phi3", "ffn_up") else NAMES[part]
        prefix = f"model.layers.{block[1]}." if block else ""
        full = prefix + target + ("" if part == "attn_sinks" else f".{kind}")
        if arch == "llama" and part in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
            yield full, halves_from_pairs(data, heads)
        else:
            yield full, data
    if arch == "gpt-oss":
        for layer in range(config.num_hidden_layers):
            yield from _experts(weights, layer)


def halves_from_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder q and k rows of a `llama` file: adjacent pairs (2i, 2i+1) to (i, i + D/2)."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _experts(weights: Weights, layer: int) -> Iterator[tuple[str, np.ndarray]]:
    """HF stores experts as [E, in, out]: gate in the even columns, up in the odd ones."""
    source, target = f"blk.{layer}.ffn_", f"model.layers.{layer}.mlp.experts."
    for kind, suffix in (("weight", ""), ("bias", "_bias")):
        gate, up = weights[f"{source}gate_exps.{kind}"], weights[f"{source}up_exps.{kind}"]  # [E, f, d] or [E, f]
        both = np.stack([gate, up], axis=2).reshape(len(gate), -1, *gate.shape[2:])
        down = weights[f"{source}down_exps.{kind}"]
        yield f"{target}gate_up_proj{suffix}", both.swapaxes(1, 2) if kind == "weight" else both
        yield f"{target}down_proj{suffix}", down.swapaxes(1, 2) if kind == "weight" else down
