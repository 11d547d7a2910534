"""Llama with experts: Mixtral and its kin. GGUF architecture `llama` with `expert_count`.

Paper: Jiang et al. 2024 (arXiv:2401.04088). Differences from llama:
  * the FFN is the top k of E experts, weighted by the softmax over the chosen logits.
"""

from worker.adapters.hparams import dense_window, require_experts
from worker.adapters.keys import ArchitectureKeys
from worker.adapters.rotary import file_rope
from worker.adapters.weights import Bias, ExpertLayer, Weights
from worker.model import Hparams, ModelOptions
from worker.ops import SWIGLU, Array, Attention, Batch, Ops, Router
from worker.rope import Rope


class Mixtral:
    """The decoder of the `llama` architecture with experts and its weights bound."""

    def __init__(self, hp: Hparams, keys: ArchitectureKeys, w: Weights, options: ModelOptions) -> None:
        self.token_embd = w.tensor("token_embd.weight", hp.vocab_size, hp.embedding_length)
        require_experts(hp, keys)
        self.experts_used = hp.expert_used_count
        window, self.choices = dense_window(keys, options)
        rope, factors = file_rope(hp, w, options.context, adjacent=True)
        self.choices |= factors
        self.layers = [mixtral_layer(hp, w, i, rope, window) for i in range(hp.block_count)]
        self.output_norm = w.norm("output_norm", hp.embedding_length, hp.rms_epsilon)
        self.output = w.output(self.token_embd)

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
            h = ops.experts_glu(n, routes, layer.gate, layer.up, SWIGLU)
            x = ops.experts_add(h, routes, layer.down, x)
        (logits,) = ops.norm_linear(x, self.output_norm, self.output)
        return logits


def mixtral_layer(hp: Hparams, w: Weights, i: int, rope: Rope, window: int) -> ExpertLayer:
    """Bind the weights of layer i; attention's projections may have biases."""
    d, experts, block = hp.embedding_length, hp.expert_count, f"blk.{i}"
    f = hp.expert_feed_forward_length or hp.feed_forward_length
    q, k, v = w.qkv(block, hp)
    return ExpertLayer(
        attn_norm=w.norm(f"{block}.attn_norm", d, hp.rms_epsilon),
        q=q,
        k=k,
        v=v,
        attention=Attention(i, hp.head_count, hp.head_count_kv, hp.head_dim, rope, window),
        attn_output=w.linear(f"{block}.attn_output", d, hp.q_width, bias=Bias.OPTIONAL),
        ffn_norm=w.norm(f"{block}.ffn_norm", d, hp.rms_epsilon),
        router=Router(w.linear(f"{block}.ffn_gate_inp", experts, d)),
        gate=w.experts(f"{block}.ffn_gate_exps", experts, f, d),
        up=w.experts(f"{block}.ffn_up_exps", experts, f, d),
        down=w.experts(f"{block}.ffn_down_exps", experts, d, f),
    )
