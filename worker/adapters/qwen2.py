"""Qwen2 and Qwen2.5. GGUF architecture `qwen2`.

Paper: Yang et al. 2024 (arXiv:2407.10671). Differences from llama:
  * biases on q, k, v and the output head alone, each optional;
  * RoPE over the pairs (i, i + D/2), with the rows of q and k not permuted.
"""

from worker.adapters.hparams import dense_window, refuse_experts
from worker.adapters.keys import ArchitectureKeys
from worker.adapters.rotary import file_rope
from worker.adapters.weights import DenseLayer, Weights
from worker.model import Hparams, ModelOptions
from worker.ops import Array, Attention, Batch, Ops
from worker.rope import Rope


class Qwen2:
    """The decoder of the `qwen2` architecture with its weights bound."""

    def __init__(self, hp: Hparams, keys: ArchitectureKeys, w: Weights, options: ModelOptions) -> None:
        self.token_embd = w.tensor("token_embd.weight", hp.vocab_size, hp.embedding_length)
        refuse_experts(hp, keys)
        window, self.choices = dense_window(keys, options)
        rope, factors = file_rope(hp, w, options.context)
        self.choices |= factors
        self.layers = [_layer(hp, w, i, rope, window) for i in range(hp.block_count)]
        self.output_norm = w.norm("output_norm", hp.embedding_length, hp.rms_epsilon)
        self.output = w.output(self.token_embd, biased=True)

    def forward(self, ops: Ops, batch: Batch) -> Array:
        """Logits [R, V] f32 of the batch's `logit_rows`."""
        x = ops.embed(self.token_embd, batch)
        for layer in self.layers:
            projections = (layer.q, layer.k, layer.v)
            attended = ops.norm_attention(x, layer.attn_norm, projections, layer.attention, batch)
            if layer is self.layers[-1]:  # the rest is needed for the requested rows only
                attended, x = ops.gather_rows(attended, batch), ops.gather_rows(x, batch)
            x = ops.linear_add(attended, layer.attn_output, x)
            h = ops.norm_glu(x, layer.ffn_norm, layer.gate, layer.up)
            x = ops.linear_add(h, layer.down, x)
        (logits,) = ops.norm_linear(x, self.output_norm, self.output)
        return logits


def _layer(hp: Hparams, w: Weights, i: int, rope: Rope, window: int) -> DenseLayer:
    d, f, block = hp.embedding_length, hp.feed_forward_length, f"blk.{i}"
    q, k, v = w.qkv(block, hp)
    return DenseLayer(
        attn_norm=w.norm(f"{block}.attn_norm", d, hp.rms_epsilon),
        q=q,
        k=k,
        v=v,
        attention=Attention(i, hp.head_count, hp.head_count_kv, hp.head_dim, rope, window),
        attn_output=w.linear(f"{block}.attn_output", d, hp.q_width),
        ffn_norm=w.norm(f"{block}.ffn_norm", d, hp.rms_epsilon),
        gate=w.linear(f"{block}.ffn_gate", f, d),
        up=w.linear(f"{block}.ffn_up", f, d),
        down=w.linear(f"{block}.ffn_down", d, f),
    )
