"""Llama and its family, SmolLM2 and Mistral among them. GGUF architecture `llama`.

Papers: Touvron et al. 2023 (arXiv:2302.13971), Llama 2 (grouped queries, arXiv:2307.09288), Llama 3
(arXiv:2407.21783). The plain decoder; the other adapters list their differences from it:
    x ← x + W_o · attention(rope(W_q n), rope(W_k n), W_v n)      n = rms_norm(x)
    x ← x + W_down · (silu(W_gate n) · W_up n)                    n = rms_norm(x)
Rows of q and k are permuted in files of this architecture, so RoPE rotates adjacent pairs (2i, 2i +
1). Where `rope_freqs.weight` [D/2] exists (Llama 3.1 and later), it divides the frequencies. Every
projection but the output head may have a bias.
"""

from worker.adapters.hparams import dense_window, refuse_experts
from worker.adapters.keys import ArchitectureKeys
from worker.adapters.rotary import file_rope
from worker.adapters.weights import Bias, DenseLayer, Weights
from worker.model import Hparams, ModelOptions
from worker.ops import Array, Attention, Batch, Ops
from worker.rope import Rope


class Llama:
    """The decoder of the `llama` architecture with its weights bound."""

    def __init__(self, hp: Hparams, keys: ArchitectureKeys, w: Weights, options: ModelOptions) -> None:
        self.token_embd = w.tensor("token_embd.weight", hp.vocab_size, hp.embedding_length)
        refuse_experts(hp, keys)
        window, self.choices = dense_window(keys, options)
        rope, factors = file_rope(hp, w, options.context, adjacent=True)
        self.choices |= factors
        self.layers = [llama_layer(hp, w, i, rope, window) for i in range(hp.block_count)]
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
            h = ops.norm_glu(x, layer.ffn_norm, layer.gate, layer.up)
            x = ops.linear_add(h, layer.down, x)
        (logits,) = ops.norm_linear(x, self.output_norm, self.output)
        return logits


def llama_layer(hp: Hparams, w: Weights, i: int, rope: Rope, window: int) -> DenseLayer:
    """Bind the weights of layer i, whose projections may all have biases."""
    d, f, block = hp.embedding_length, hp.feed_forward_length, f"blk.{i}"
    q, k, v = w.qkv(block, hp)
    return DenseLayer(
        attn_norm=w.norm(f"{block}.attn_norm", d, hp.rms_epsilon),
        q=q,
        k=k,
        v=v,
        attention=Attention(i, hp.head_count, hp.head_count_kv, hp.head_dim, rope, window),
        attn_output=w.linear(f"{block}.attn_output", d, hp.q_width, bias=Bias.OPTIONAL),
        ffn_norm=w.norm(f"{block}.ffn_norm", d, hp.rms_epsilon),
        gate=w.linear(f"{block}.ffn_gate", f, d, bias=Bias.OPTIONAL),
        up=w.linear(f"{block}.ffn_up", f, d, bias=Bias.OPTIONAL),
        down=w.linear(f"{block}.ffn_down", d, f, bias=Bias.OPTIONAL),
    )
