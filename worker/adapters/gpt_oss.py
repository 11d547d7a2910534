"""gpt-oss, a mixture of experts. GGUF architecture `gpt-oss`.

Card: OpenAI 2025 (arXiv:2508.10925). Differences from llama:
  * biases on q, k, v (each optional) and the attention output; q is H·D wide, not d;
  * one sink logit per head in the softmax denominator (Xiao et al. 2023, arXiv:2309.17453);
  * some layers (even ones, unless the file says otherwise) attend to the newest
    `attention.sliding_window` keys, the token's own included, the others to all;
  * RoPE over the pairs (i, i + D/2) with YaRN, whose ramp bounds are not rounded;
  * the FFN is the top k of E experts, with a softmax over the chosen logits, biases in router and
  experts, and
    clamps in the gated product: min(g, 7)·σ(1.702·g)·(clip(u, ±7) + 1).
"""

from dataclasses import dataclass

from worker.adapters.hparams import require_experts, windowed_layers
from worker.adapters.keys import ArchitectureKeys
from worker.adapters.weights import Bias, Weights
from worker.model import Hparams, ModelOptions
from worker.ops import Activation, Array, Attention, Batch, Linear, Ops, RmsNorm, Router
from worker.rope import Rope, scaled_rope

CLAMPED_SWIGLU = Activation(limit=7.0, alpha=1.702)


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one layer."""

    attn_norm: RmsNorm  # [d]
    q: Linear  # [H·D, d], optional bias
    k: Linear  # [Hk·D, d], optional bias
    v: Linear  # [Hk·D, d], optional bias
    attention: Attention  # sinks [H]
    attn_output: Linear  # [d, H·D], bias
    ffn_norm: RmsNorm  # [d]
    router: Router  # [E, d], bias
    gate: Linear  # [E, f, d], bias
    up: Linear  # [E, f, d], bias
    down: Linear  # [E, d, f], bias


class GptOss:
    """The decoder of the `gpt-oss` architecture with its weights bound."""

    def __init__(self, hp: Hparams, keys: ArchitectureKeys, w: Weights, options: ModelOptions) -> None:
        require_experts(hp, keys)
        self.choices: dict[str, str] = {}
        self.experts_used = hp.expert_used_count
        self.token_embd = w.tensor("token_embd.weight", hp.vocab_size, hp.embedding_length)
        window = keys.count("attention.sliding_window")
        width = hp.expert_feed_forward_length or hp.feed_forward_length
        bases = hp.rope_freq_base, keys.positive("rope.freq_base_swa", default=hp.rope_freq_base)
        ropes = {base: _rope(hp, keys, options, base) for base in bases}  # tables of one base are made once
        self.layers = [
            _layer(hp, w, i, ropes[bases[windowed]], width, window if windowed else 0)
            for i, windowed in enumerate(windowed_layers(hp, keys, period=2))
        ]
        self.output_norm = w.norm("output_norm", hp.embedding_length, hp.rms_epsilon)
        self.output = w.linear("output", *self.token_embd.shape)

    def forward(self, ops: Ops, batch: Batch) -> Array:
        """Logits [R, V] f32 of the batch's `logit_rows`."""
        x = ops.embed(self.token_embd, batch)
        for layer in self.layers:
            projections = (layer.q, layer.k, layer.v)
            attended = ops.norm_attention(x, layer.attn_norm, projections, layer.attention, batch)
            if layer is self.layers[-1]:  # the rest is needed for the requested rows only
                attended, x = ops.gather_rows(attended, batch), ops.gather_rows(x, batch)
            x = ops.linear_add(attended, layer.attn_output, x)
            n, routes = ops.norm_route(x, layer.ffn_norm, layer.router, self.experts_used)
            h = ops.experts_glu(n, routes, layer.gate, layer.up, CLAMPED_SWIGLU)
            x = ops.experts_add(h, routes, layer.down, x)
        (logits,) = ops.norm_linear(x, self.output_norm, self.output)
        return logits


def _rope(hp: Hparams, keys: ArchitectureKeys, options: ModelOptions, base: float) -> Rope:
    if hp.rope_scaling.kind == "longrope":
        raise keys.error("rope.scaling.type", "is 'longrope'", "none, linear or yarn")
    return scaled_rope(base, hp.rope_dims, options.context, hp.rope_scaling, truncate=False)


def _layer(hp: Hparams, w: Weights, i: int, rope: Rope, f: int, window: int) -> Layer:
    d, experts, block = hp.embedding_length, hp.expert_count, f"blk.{i}"
    q, k, v = w.qkv(block, hp)
    sinks = w.vector(f"{block}.attn_sinks.weight", hp.head_count)
    return Layer(
        attn_norm=w.norm(f"{block}.attn_norm", d, hp.rms_epsilon),
        q=q,
        k=k,
        v=v,
        attention=Attention(i, hp.head_count, hp.head_count_kv, hp.head_dim, rope, window, sinks),
        attn_output=w.linear(f"{block}.attn_output", d, hp.q_width, bias=Bias.REQUIRED),
        ffn_norm=w.norm(f"{block}.post_attention_norm", d, hp.rms_epsilon),
        router=Router(w.linear(f"{block}.ffn_gate_inp", experts, d, bias=Bias.REQUIRED)),
        gate=w.experts(f"{block}.ffn_gate_exps", experts, f, d, bias=Bias.REQUIRED),
        up=w.experts(f"{block}.ffn_up_exps", experts, f, d, bias=Bias.REQUIRED),
        down=w.experts(f"{block}.ffn_down_exps", experts, d, f, bias=Bias.REQUIRED),
    )
