"""Granite 3 and 4 with experts, without state-space layers. GGUF architecture `granitemoe`.

Model card: IBM Granite Team 2024 (Granite 3.0 Language Models). Differences from granite:
  * the FFN is the top k of E experts, weighted by the softmax over the chosen logits;
  * where `expert_shared_feed_forward_length` is not 0, a dense FFN of that width is added, which
    reads the same norm. The residual scale multiplies the sum of both.
"""

from dataclasses import dataclass, replace

from worker.adapters.granite import granite_rope, read_scales
from worker.adapters.hparams import dense_window, require_experts
from worker.adapters.keys import ArchitectureKeys
from worker.adapters.mixtral import mixtral_layer
from worker.adapters.weights import ExpertLayer, Weights
from worker.model import Hparams, ModelOptions
from worker.ops import SWIGLU, Array, Batch, Linear, Ops


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """Weights of a dense FFN of width s beside the experts of a layer."""

    gate: Linear  # [s, d]
    up: Linear  # [s, d]
    down: Linear  # [d, s]


class GraniteMoe:
    """The decoder of the `granitemoe` architecture with its weights bound."""

    def __init__(self, hp: Hparams, keys: ArchitectureKeys, w: Weights, options: ModelOptions) -> None:
        self.token_embd = w.tensor("token_embd.weight", hp.vocab_size, hp.embedding_length)
        require_experts(hp, keys)
        self.experts_used = hp.expert_used_count
        self.scales = read_scales(hp, keys)
        window, self.choices = dense_window(keys, options)
        rope, factors = granite_rope(hp, keys, w, options)
        self.choices |= factors
        folded = replace(hp, rms_epsilon=self.scales.epsilon)
        self.layers = [mixtral_layer(folded, w, i, rope, window) for i in range(hp.block_count)]
        width = keys.width("expert_shared_feed_forward_length")
        self.shared = [_shared_expert(hp, w, i, width) if width else None for i in range(hp.block_count)]
        self.output_norm = w.norm("output_norm", hp.embedding_length, folded.rms_epsilon, self.scales.output_norm)
        self.output = w.output(self.token_embd)

    def forward(self, ops: Ops, batch: Batch) -> Array:
        """Logits [R, V] f32 of the batch's `logit_rows`."""
        x = ops.embed(self.token_embd, batch, self.scales.embedding)
        for layer, shared in zip(self.layers, self.shared, strict=True):
            projections = (layer.q, layer.k, layer.v)
            attended = ops.norm_attention(x, layer.attn_norm, projections, layer.attention, batch)
            if layer is self.layers[-1]:  # the rest is needed for the requested rows only
                attended, x = ops.gather_rows(attended, batch), ops.gather_rows(x, batch)
            x = ops.linear_add(attended, layer.attn_output, x)
            x = _feed_forward(ops, x, layer, shared, self.experts_used)
        (logits,) = ops.norm_linear(x, self.output_norm, self.output)
        return logits


def _feed_forward(ops: Ops, x: Array, layer: ExpertLayer, shared: SharedExpert | None, k: int) -> Array:
    """x plus the shared expert, if any, and `k` routed experts, all of norm(x): [T, d] f32."""
    residual = x  # that of experts_add must be older than experts_glu
    if shared is not None:
        residual = ops.linear_add(ops.norm_glu(x, layer.ffn_norm, shared.gate, shared.up), shared.down, x)
    n, routes = ops.norm_route(x, layer.ffn_norm, layer.router, k)
    h = ops.experts_glu(n, routes, layer.gate, layer.up, SWIGLU)
    return ops.experts_add(h, routes, layer.down, residual)


def _shared_expert(hp: Hparams, w: Weights, i: int, width: int) -> SharedExpert:
    d, block = hp.embedding_length, f"blk.{i}"
    gate, up = (w.linear(f"{block}.ffn_{part}_shexp", width, d) for part in ("gate", "up"))
    return SharedExpert(gate, up, w.linear(f"{block}.ffn_down_shexp", d, width))
