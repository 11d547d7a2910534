"""Gemma 3, text. GGUF architecture `gemma3`.

Paper: Gemma Team 2025 (arXiv:2503.19786). Differences from llama:
  * the embedding is multiplied by √d;
  * RMSNorms of the attention's and of the FFN's result, before the addition;
  * an RMSNorm of each query and key head, before RoPE over the pairs (i, i + D/2);
  * some layers (five of six, unless the file has another period) attend to the newest
    `attention.sliding_window` keys, the token's own included, and have their own RoPE base; the
    linear factor of RoPE applies to the others alone;
  * queries are scaled by D^-0.5, those of 27B (62 layers) by (d/H)^-0.5;
  * the gate of the FFN is GELU in its tanh form; q is H·D wide, not d.
Files hold the norm weights with the 1 that Gemma's norms add.
"""

import math
from dataclasses import dataclass, replace

from worker.adapters.hparams import refuse_experts, windowed_layers
from worker.adapters.keys import ArchitectureKeys
from worker.adapters.weights import Weights
from worker.model import Hparams, ModelOptions
from worker.ops import GELU_GLU, Array, Attention, Batch, Linear, Ops, RmsNorm
from worker.rope import Rope, scaled_rope

LAYERS_OF_27B = 62
"""The number of layers of the model whose query scale is not D^-0.5; no key has the scale."""
PERIOD = 6
"""The last layer of every so many attends to all positions, unless the file has another number."""
LOCAL_ROPE_BASE = 10000.0


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one layer."""

    attn_norm: RmsNorm  # [d]
    q: Linear  # [H·D, d]
    k: Linear  # [Hk·D, d]
    v: Linear  # [Hk·D, d]
    attention: Attention
    attn_output: Linear  # [d, H·D]
    attn_post_norm: RmsNorm  # [d]
    ffn_norm: RmsNorm  # [d]
    gate: Linear  # [f, d]
    up: Linear  # [f, d]
    down: Linear  # [d, f]
    ffn_post_norm: RmsNorm  # [d]


class Gemma3:
    """The decoder of the `gemma3` architecture with its weights bound."""

    def __init__(self, hp: Hparams, keys: ArchitectureKeys, w: Weights, options: ModelOptions) -> None:
        refuse_experts(hp, keys)
        self.choices: dict[str, str] = {}
        self.token_embd = w.tensor("token_embd.weight", hp.vocab_size, hp.embedding_length)
        window = keys.sliding_window()
        local, everywhere = _ropes(hp, keys, options)
        query_scale = _query_scale(hp, keys)
        self.layers = [
            _layer(hp, w, i, local, query_scale, window)
            if window and windowed
            else _layer(hp, w, i, everywhere, query_scale)
            for i, windowed in enumerate(windowed_layers(hp, keys, period=PERIOD))
        ]
        self.embedding_scale = math.sqrt(hp.embedding_length)
        self.output_norm = w.norm("output_norm", hp.embedding_length, hp.rms_epsilon)
        self.output = w.output(self.token_embd)

    def forward(self, ops: Ops, batch: Batch) -> Array:
        """Logits [R, V] f32 of the batch's `logit_rows`."""
        x = ops.embed(self.token_embd, batch, self.embedding_scale)
        for layer in self.layers:
            projections = (layer.q, layer.k, layer.v)
            attended = ops.norm_attention(x, layer.attn_norm, projections, layer.attention, batch)
            if layer is self.layers[-1]:  # the rest is needed for the requested rows only
                attended, x = ops.gather_rows(attended, batch), ops.gather_rows(x, batch)
            x = ops.linear_norm_add(attended, layer.attn_output, layer.attn_post_norm, x)
            h = ops.norm_glu(x, layer.ffn_norm, layer.gate, layer.up, GELU_GLU)
            x = ops.linear_norm_add(h, layer.down, layer.ffn_post_norm, x)
        (logits,) = ops.norm_linear(x, self.output_norm, self.output)
        return logits


def _ropes(hp: Hparams, keys: ArchitectureKeys, options: ModelOptions) -> tuple[Rope, Rope]:
    """RoPE of the layers with a window and of those without."""
    scaling = hp.rope_scaling
    if scaling.kind not in ("none", "linear"):
        raise keys.error("rope.scaling.type", f"is {scaling.kind!r}", "none or linear")
    base = keys.positive("rope.freq_base_swa", default=LOCAL_ROPE_BASE)
    local = scaled_rope(base, hp.rope_dims, options.context, replace(scaling, factor=1.0))
    return local, scaled_rope(hp.rope_freq_base, hp.rope_dims, options.context, scaling)


def _query_scale(hp: Hparams, keys: ArchitectureKeys) -> float:
    """What queries are multiplied by, divided by the D^-0.5 that attention applies."""
    width = hp.embedding_length // hp.head_count if hp.block_count == LAYERS_OF_27B else hp.head_dim
    in_file = keys.get("attention.scale", float, 0.0)
    if in_file and not math.isclose(in_file, width**-0.5, rel_tol=1e-6):
        raise keys.error("attention.scale", f"is {in_file}", f"no such key, or {width**-0.5}")
    return math.sqrt(hp.head_dim / width)


def _layer(hp: Hparams, w: Weights, i: int, rope: Rope, query_scale: float, window: int = 0) -> Layer:
    d, f, eps, block = hp.embedding_length, hp.feed_forward_length, hp.rms_epsilon, f"blk.{i}"
    q, k, v = w.qkv(block, hp)
    return Layer(
        attn_norm=w.norm(f"{block}.attn_norm", d, eps),
        q=q,
        k=k,
        v=v,
        attention=Attention(
            *(i, hp.head_count, hp.head_count_kv, hp.head_dim, rope, window),
            q_norm=w.norm(f"{block}.attn_q_norm", hp.head_dim, eps, scale=query_scale),
            k_norm=w.norm(f"{block}.attn_k_norm", hp.head_dim, eps),
        ),
        attn_output=w.linear(f"{block}.attn_output", d, hp.q_width),
        attn_post_norm=w.norm(f"{block}.post_attention_norm", d, eps),
        ffn_norm=w.norm(f"{block}.ffn_norm", d, eps),
        gate=w.linear(f"{block}.ffn_gate", f, d),
        up=w.linear(f"{block}.ffn_up", f, d),
        down=w.linear(f"{block}.ffn_down", d, f),
        ffn_post_norm=w.norm(f"{block}.post_ffw_norm", d, eps),
    )
