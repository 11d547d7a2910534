"""Granite 3 and 4 without experts or state-space layers. GGUF architecture `granite`.

Model card: IBM Granite Team 2024 (Granite 3.0 Language Models). Differences from llama:
  * four scales: the embedding times e, attention's logits times a instead of D^-0.5, the result of
    each attention and FFN times r before it is added to the residual, the logits divided by l;
  * no RoPE at all where `rope.scaling.finetuned` is false.

No op takes r, a or l: they are folded into values that exist (`Scales`).
  * r: the residual x is computed as y = x/r. Then x + r·f(norm(x)) is y + f(norm(r·y)), and
    norm(r·y; eps) = r·y / sqrt(r²·mean(y²) + eps) = norm(y; eps/r²). So the embedding is scaled by
    e/r, and every norm's eps is divided by r².
  * a: queries and keys are both multiplied by sqrt(a · sqrt(D)), in RoPE's cosines and sines.
  * l: the weight of the output norm is divided by l.
"""

from dataclasses import dataclass, replace

import numpy as np

from worker.adapters.hparams import dense_window, refuse_experts
from worker.adapters.keys import ArchitectureKeys
from worker.adapters.llama import llama_layer
from worker.adapters.rotary import attention_scaled_rope, file_rope
from worker.adapters.weights import Weights
from worker.model import Hparams, ModelOptions
from worker.ops import Array, Batch, Ops
from worker.rope import Rope

WITHOUT_EFFECT = (
    *(f"ssm.{name}" for name in ("conv_kernel", "state_size", "group_count", "inner_size", "time_step_rank")),
    "deepstack_mapping",
)
"""Keys of layers that this architecture lacks (Granite 4's converter writes them) and of images."""


@dataclass(frozen=True, slots=True)
class Scales:
    """Granite's scales in the form in which they are computed, see the module."""

    embedding: float
    """e/r"""
    epsilon: float
    """eps/r² of all norms."""
    output_norm: float
    """1/l"""


class Granite:
    """The decoder of the `granite` architecture with its weights bound."""

    def __init__(self, hp: Hparams, keys: ArchitectureKeys, w: Weights, options: ModelOptions) -> None:
        self.token_embd = w.tensor("token_embd.weight", hp.vocab_size, hp.embedding_length)
        refuse_experts(hp, keys)
        self.scales = read_scales(hp, keys)
        window, self.choices = dense_window(keys, options)
        rope, factors = granite_rope(hp, keys, w, options)
        self.choices |= factors
        folded = replace(hp, rms_epsilon=self.scales.epsilon)
        self.layers = [llama_layer(folded, w, i, rope, window) for i in range(hp.block_count)]
        self.output_norm = w.norm("output_norm", hp.embedding_length, folded.rms_epsilon, self.scales.output_norm)
        self.output = w.output(self.token_embd)

    def forward(self, ops: Ops, batch: Batch) -> Array:
        """Logits [R, V] f32 of the batch's `logit_rows`."""
        x = ops.embed(self.token_embd, batch, self.scales.embedding)
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


def read_scales(hp: Hparams, keys: ArchitectureKeys) -> Scales:
    """Read the scales of embedding, residual and logits, and the keys that change nothing.

    Raises ModelLoadFailed, which names the key, for a negative scale and for a missing logit scale.
    """
    for key in WITHOUT_EFFECT:
        keys.value(key)
    residual = keys.scale("residual_scale")
    keys.positive("logit_scale")  # required, as in llama.cpp
    return Scales(
        embedding=keys.scale("embedding_scale") / residual,
        epsilon=hp.rms_epsilon / residual**2,
        output_norm=1 / keys.scale("logit_scale"),
    )


def granite_rope(hp: Hparams, keys: ArchitectureKeys, w: Weights, options: ModelOptions) -> tuple[Rope, dict[str, str]]:
    """RoPE with the attention scale, and its load-time choices, as `file_rope` returns them.

    Rotates by the angle 0 where `rope.scaling.finetuned` is false.
    """
    rope, choices = file_rope(hp, w, options.context, adjacent=True)
    if not keys.get("rope.scaling.finetuned", bool, True):
        rope = Rope(np.zeros(hp.head_dim // 2), rope.context, adjacent=True)
    scale = keys.scale("attention.scale", default=hp.head_dim**-0.5)
    return attention_scaled_rope(rope, scale, hp, keys), choices
