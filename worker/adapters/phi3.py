"""Phi-3-mini. GGUF architecture `phi3`.

Paper: Abdin et al. 2024 (arXiv:2404.14219). What differs from llama: q, k and v are one fused tensor, gate and up
another (gate first); RoPE over the pairs (i, i + D/2); long-context files carry LongRoPE's frequency divisors, the long
ones iff the context fixed at load exceeds the original one, never by the current length (so that bits don't move while
a sequence grows). The file's sliding window is applied only where `phi3_window` asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from worker.adapters.rope import frequencies, longrope_magnitude, scaled_tables, tables
from worker.adapters.weights import Weights
from worker.model import Hparams, ModelOptions
from worker.ops import Array, Attention, Batch, Linear, Ops, RmsNorm, Rope


@dataclass(frozen=True, slots=True)
class Layer:
    """One block's weights; the projections are row ranges of the fused tensors."""

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


class Phi3:
    """The decoder of the `phi3` architecture, bound to one file's weights."""

    def __init__(self, hp: Hparams, w: Weights, options: ModelOptions) -> None:
        self.token_embd = w.tensor("token_embd.weight", hp.vocab_size, hp.embedding_length)
        rope = _rope(hp, w, options.context)
        window = hp.sliding_window if options.phi3_window else 0
        self.layers = [_layer(hp, w, i, rope, window) for i in range(hp.block_count)]
        self.output_norm = w.norm("output_norm", hp.embedding_length, hp.rms_epsilon)
        self.output = w.output(self.token_embd)

    def forward(self, ops: Ops, batch: Batch) -> Array:
        """Logits [R, V] f32 of the rows that the batch asks for."""
        x = ops.embed(self.token_embd, batch)
        for layer in self.layers:
            q, k, v = ops.norm_linear(x, layer.attn_norm, layer.q, layer.k, layer.v)
            attended = ops.attention(q, k, v, layer.attention, batch)
            if layer is self.layers[-1]:  # what follows is wanted of few tokens
                attended, x = ops.gather_rows(attended, batch), ops.gather_rows(x, batch)
            x = ops.linear_add(attended, layer.attn_output, x)
            h = ops.norm_glu(x, layer.ffn_norm, layer.gate, layer.up)
            x = ops.linear_add(h, layer.down, x)
        (logits,) = ops.norm_linear(x, self.output_norm, self.output)
        return logits


def _layer(hp: Hparams, w: Weights, i: int, rope: Rope, window: int) -> Layer:
    d, f, block = hp.embedding_length, hp.feed_forward_length, f"blk.{i}"
    q_end, k_end, v_end = hp.q_width, hp.q_width + hp.kv_width, hp.q_width + 2 * hp.kv_width
    qkv = w.linear(f"{block}.attn_qkv", v_end, d)
    gate_up = w.linear(f"{block}.ffn_up", 2 * f, d)
    return Layer(
        attn_norm=w.norm(f"{block}.attn_norm", d, hp.rms_epsilon),
        q=qkv.rows(0, q_end),
        k=qkv.rows(q_end, k_end),
        v=qkv.rows(k_end, v_end),
        attention=Attention(i, hp.head_count, hp.head_count_kv, hp.head_dim, rope, window),
        attn_output=w.linear(f"{block}.attn_output", d, hp.q_width),
        ffn_norm=w.norm(f"{block}.ffn_norm", d, hp.rms_epsilon),
        gate=gate_up.rows(0, f),
        up=gate_up.rows(f, 2 * f),
        down=w.linear(f"{block}.ffn_down", d, f),
    )


def _rope(hp: Hparams, w: Weights, context: int) -> Rope:
    """Plain tables, or LongRoPE's (Ding et al. 2024) where the file has factors; both sets are claimed."""
    if not w.has("rope_factors_long.weight"):
        return scaled_tables(hp, context)
    long = w.host_vector("rope_factors_long.weight", hp.rope_dims // 2)
    short = w.host_vector("rope_factors_short.weight", hp.rope_dims // 2)
    scaling = hp.rope_scaling
    divisors = long if context > scaling.original_context else short
    magnitude = scaling.attn_factor or longrope_magnitude(hp.context_length, scaling.original_context)
    return tables(frequencies(hp.rope_freq_base, hp.rope_dims) / divisors, context, magnitude=magnitude)
