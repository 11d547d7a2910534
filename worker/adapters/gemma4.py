"""Gemma 4, text: E2B, E4B, 26B-A4B and 31B. GGUF architecture `gemma4`.

Model card: Google DeepMind 2026 (Gemma 4). Differences from gemma3:
  * layers without a window have wider heads (`attention.key_length`) and fewer KV heads than those
    with one (`attention.key_length_swa`), and may lack a projection of v: v is k before its norm
    and RoPE;
  * v heads are normalized, without a weight, and attention's scores are not scaled;
  * in layers without a window `rope_freqs.weight` divides the frequencies; large divisors leave
    three quarters of the pairs unrotated;
  * a layer's result is multiplied by a number, logits are limited by cap·tanh(logits/cap);
  * 26B-A4B: routed experts beside the dense FFN of every layer, each branch with a norm after it,
    then the norm of their sum. The router has a norm of its own; each expert's weight has a factor;
  * E2B, E4B: the last `attention.shared_kv_layers` layers read the keys and values of the last
    earlier layer of their kind. Per-layer embeddings: a second table has P elements for each layer
    (`embedding_length_per_layer_input`); a projection of the first one is added to it. After its
    FFN, a layer gates its row by the residual, projects it and adds its norm to the residual.
Files hold the norm weights as they are applied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from worker.adapters.hparams import require_experts, windowed_layers
from worker.adapters.keys import ArchitectureKeys
from worker.adapters.rotary import DIVISORS
from worker.adapters.weights import Weights
from worker.model import Hparams, ModelOptions
from worker.ops import GELU_GLU, Array, Attention, Batch, Linear, Ops, QTensor, RmsNorm, Router
from worker.rope import Rope, scaled_rope

LOCAL_ROPE_BASE, LOGIT_CAP = 10000.0, 30.0
"""Values of files without the keys, as in llama.cpp."""


@dataclass(frozen=True, slots=True)
class Experts:
    """Weights of the routed experts beside the dense FFN of a layer."""

    dense_post_norm: RmsNorm  # [d], of the dense FFN's result
    norm: RmsNorm  # [d], of the experts' input
    post_norm: RmsNorm  # [d], of their sum
    router: Router  # [E, d]
    gate: Linear  # [E, f, d]
    up: Linear  # [E, f, d]
    down: Linear  # [E, d, f]


@dataclass(frozen=True, slots=True)
class OwnInput:
    """Weights with which a layer adds its per-layer embedding [T, P] to the residual."""

    gate: Linear  # [P, d]
    projection: Linear  # [d, P]
    post_norm: RmsNorm  # [d]


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """Weights from which the per-layer embeddings of all layers are computed."""

    table: QTensor  # [V, layers·P]
    scale: float
    projection: Linear  # [layers·P, d]
    norm: RmsNorm  # [P]


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one layer. H, Hk and D may differ between layers, and f."""

    attn_norm: RmsNorm  # [d]
    projections: tuple[Linear, ...]  # q [H·D, d] and, if the layer has them, k and v [Hk·D, d]
    attention: Attention
    attn_output: Linear  # [d, H·D]
    attn_post_norm: RmsNorm  # [d]
    ffn_norm: RmsNorm  # [d]
    gate: Linear  # [f, d]
    up: Linear  # [f, d]
    down: Linear  # [d, f]
    ffn_post_norm: RmsNorm  # [d]
    experts: Experts | None
    own_input: OwnInput | None
    scale: float
    """Multiplies the layer's result."""


@dataclass(frozen=True, slots=True)
class Heads:
    """What the attention of a layer depends on: its heads, its RoPE, its window and its cache."""

    kv: int
    dim: int
    rope: Rope
    window: int
    source: int
    """The layer whose keys and values are read: itself, or an earlier one."""


class Gemma4:
    """The decoder of the `gemma4` architecture with its weights bound."""

    def __init__(self, hp: Hparams, keys: ArchitectureKeys, w: Weights, options: ModelOptions) -> None:
        _refuse_parts(hp, keys)
        if hp.expert_count:
            require_experts(hp, keys)
            keys.count("expert_feed_forward_length")  # in `hp`, where it may be missing
        elif used := hp.expert_used_count:
            problem = "is 0" if "expert_count" in keys else "is missing"
            used_by = keys.name("expert_used_count")
            raise keys.error("expert_count", problem, f"the experts of which {used_by} uses {used}")
        self.experts_used = hp.expert_used_count
        self.choices: dict[str, str] = {}
        self.token_embd = w.tensor("token_embd.weight", hp.vocab_size, hp.embedding_length)
        widths = keys.counts_of_layers("feed_forward_length", hp.block_count)
        heads = _heads(hp, keys, w, options)
        self.layers = [_layer(hp, w, i, *each) for i, each in enumerate(zip(heads, widths, strict=True))]
        self.inputs = _layer_inputs(hp, w) if keys.width("embedding_length_per_layer_input") else None
        self.embedding_scale = math.sqrt(hp.embedding_length)
        self.output_norm = w.norm("output_norm", hp.embedding_length, hp.rms_epsilon)
        self.output = w.output(self.token_embd)
        self.cap = keys.get("final_logit_softcapping", float, LOGIT_CAP)
        if not 0 <= self.cap < math.inf:
            raise keys.error("final_logit_softcapping", f"is {self.cap}", "0 for no cap, or a positive number")

    def forward(self, ops: Ops, batch: Batch) -> Array:
        """Logits [R, V] f32 of the batch's `logit_rows`."""
        x = ops.embed(self.token_embd, batch, self.embedding_scale)
        inputs = None
        if (own := self.inputs) is not None:
            rows = ops.embed(own.table, batch, own.scale)
            inputs = ops.layer_inputs(x, own.projection, own.norm, rows)
        for i, layer in enumerate(self.layers):
            q, *kv = ops.norm_linear(x, layer.attn_norm, *layer.projections)
            k, v = (kv[0], kv[-1]) if kv else (None, None)
            attended = ops.attention(q, k, v, layer.attention, batch)
            if layer is self.layers[-1]:  # the rest is needed for the requested rows only
                attended, x = ops.gather_rows(attended, batch), ops.gather_rows(x, batch)
                inputs = None if own is None else ops.gather_rows(inputs, batch)
            x = ops.linear_norm_add(attended, layer.attn_output, layer.attn_post_norm, x)
            x = _feed_forward(ops, x, layer, self.experts_used)
            if (each := layer.own_input) is not None:
                h = ops.linear_gate(x, each.gate, inputs, i, GELU_GLU)
                x = ops.linear_norm_add(h, each.projection, each.post_norm, x, layer.scale)
        (logits,) = ops.norm_linear(x, self.output_norm, self.output)
        return ops.softcap(logits, self.cap) if self.cap else logits


def _feed_forward(ops: Ops, x: Array, layer: Layer, k: int) -> Array:
    """x, the residual after attention, plus the dense FFN and `k` experts, if any."""
    h = ops.norm_glu(x, layer.ffn_norm, layer.gate, layer.up, GELU_GLU)
    scale = 1.0 if layer.own_input else layer.scale  # it follows the layer's own input
    if (experts := layer.experts) is None:
        return ops.linear_norm_add(h, layer.down, layer.ffn_post_norm, x, scale)
    dense = ops.linear_add(h, layer.down, None)
    n, routes = ops.norm_route(x, experts.norm, experts.router, k)
    h = ops.experts_glu(n, routes, experts.gate, experts.up, GELU_GLU)
    routed = ops.experts_add(h, routes, experts.down, None)
    branches = (dense, experts.dense_post_norm), (routed, experts.post_norm)
    return ops.branches_norm_add(branches, layer.ffn_post_norm, x, scale)


def _refuse_parts(hp: Hparams, keys: ArchitectureKeys) -> None:
    """Raise ModelLoadFailed, which names the key, for a part of Gemma 4 that is not computed."""
    scaling = hp.rope_scaling
    if scaling.kind not in ("none", "linear") or scaling.factor != 1:
        raise keys.error("rope.scaling.type", f"is {scaling.kind!r} by {scaling.factor}", "no scaling")


def _heads(hp: Hparams, keys: ArchitectureKeys, w: Weights, options: ModelOptions) -> list[Heads]:
    """The heads of each layer. Raises ModelLoadFailed for keys that no heads can have."""
    counts = keys.counts_of_layers("attention.head_count_kv", hp.block_count, default=hp.head_count)
    if any(hp.head_count % count for count in counts):
        shown = ", ".join(map(str, counts[:8]))
        raise keys.error("attention.head_count_kv", f"is {shown}", f"divisors of the {hp.head_count} query heads")
    windowed = windowed_layers(hp, keys, period=None)
    width, dims = _local_widths(keys)
    base = keys.positive("rope.freq_base_swa", default=LOCAL_ROPE_BASE)
    local = scaled_rope(base, dims, options.context, hp.rope_scaling)
    divisors = None if all(windowed) else w.divisors(DIVISORS, hp.rope_dims // 2)
    everywhere = scaled_rope(hp.rope_freq_base, hp.rope_dims, options.context, hp.rope_scaling, divisors=divisors)
    window = keys.count("attention.sliding_window")
    sources = _sources(hp, keys, windowed)
    if differing := [i for i, source in enumerate(sources) if counts[i] != counts[source]]:
        expected = f"that of layer {sources[differing[0]]}, whose keys and values layer {differing[0]} reads"
        raise keys.error("attention.head_count_kv", f"is {counts[differing[0]]} in layer {differing[0]}", expected)
    return [
        Heads(count, width, local, window, source) if local_layer else Heads(count, hp.head_dim, everywhere, 0, source)
        for count, local_layer, source in zip(counts, windowed, sources, strict=True)
    ]


def _sources(hp: Hparams, keys: ArchitectureKeys, windowed: list[bool]) -> list[int]:
    """The layer whose keys and values each layer reads. Raises ModelLoadFailed if there is none."""
    shared = keys.width("attention.shared_kv_layers")
    own = max(0, hp.block_count - shared)
    newest = {kind: i for i, kind in enumerate(windowed[:own])}
    if not set(windowed) <= set(newest):
        expected = f"fewer than {hp.block_count}, with an earlier layer of each kind"
        raise keys.error("attention.shared_kv_layers", f"is {shared}", expected)
    return [*range(own), *(newest[kind] for kind in windowed[own:])]


def _local_widths(keys: ArchitectureKeys) -> tuple[int, int]:
    """The head width of layers with a window, and how many elements of it are rotated."""
    width = keys.count("attention.key_length_swa")
    if (values := keys.count("attention.value_length_swa", default=width)) != width:
        raise keys.error("attention.value_length_swa", f"is {values}", str(width))
    dims = keys.count("rope.dimension_count_swa", default=width)
    if dims % 2 or dims > width:
        raise keys.error("rope.dimension_count_swa", f"is {dims}", f"an even number up to {width}")
    return width, dims


def _layer(hp: Hparams, w: Weights, i: int, heads: Heads, f: int) -> Layer:
    d, eps, block = hp.embedding_length, hp.rms_epsilon, f"blk.{i}"
    q, kv, reads_only = hp.head_count * heads.dim, heads.kv * heads.dim, heads.source != i
    names = [("attn_q", q)]
    if reads_only:  # files may have what such layers do not use
        w.leave_out(*(f"{block}.{name}.weight" for name in ("attn_k", "attn_v", "attn_k_norm")))
    else:
        names += [("attn_k", kv), *([("attn_v", kv)] if w.has(f"{block}.attn_v.weight") else [])]
    scale = f"{block}.layer_output_scale.weight"
    return Layer(
        attn_norm=w.norm(f"{block}.attn_norm", d, eps),
        projections=tuple(w.linear(f"{block}.{name}", rows, d) for name, rows in names),
        attention=Attention(
            *(heads.source, hp.head_count, heads.kv, heads.dim, heads.rope, heads.window),
            # Attention divides the scores by the root that multiplies the queries here.
            q_norm=w.norm(f"{block}.attn_q_norm", heads.dim, eps, scale=math.sqrt(heads.dim)),
            k_norm=None if reads_only else w.norm(f"{block}.attn_k_norm", heads.dim, eps),
            v_epsilon=None if reads_only else eps,
            reads_only=reads_only,
        ),
        attn_output=w.linear(f"{block}.attn_output", d, q),
        attn_post_norm=w.norm(f"{block}.post_attention_norm", d, eps),
        ffn_norm=w.norm(f"{block}.ffn_norm", d, eps),
        gate=w.linear(f"{block}.ffn_gate", f, d),
        up=w.linear(f"{block}.ffn_up", f, d),
        down=w.linear(f"{block}.ffn_down", d, f),
        ffn_post_norm=w.norm(f"{block}.post_ffw_norm", d, eps),
        experts=_experts(hp, w, block) if hp.expert_count else None,
        own_input=_own_input(hp, w, block) if hp.layer_input_length else None,
        scale=float(w.host_vector(scale, 1)[0]) if w.has(scale) else 1.0,
    )


def _experts(hp: Hparams, w: Weights, block: str) -> Experts:
    d, eps, experts, f = hp.embedding_length, hp.rms_epsilon, hp.expert_count, hp.expert_feed_forward_length
    gate, up = w.experts_gate_up(block, experts, f, d)
    scales = f"{block}.ffn_down_exps.scale"
    return Experts(
        dense_post_norm=w.norm(f"{block}.post_ffw_norm_1", d, eps),
        norm=w.norm(f"{block}.pre_ffw_norm_2", d, eps),
        post_norm=w.norm(f"{block}.post_ffw_norm_2", d, eps),
        router=Router(
            w.linear(f"{block}.ffn_gate_inp", experts, d),
            RmsNorm(w.vector(f"{block}.ffn_gate_inp.scale", d, scale=1 / math.sqrt(d)), eps),
            w.vector(scales, experts) if w.has(scales) else None,
        ),
        gate=gate,
        up=up,
        down=w.experts(f"{block}.ffn_down_exps", experts, d, f),
    )


def _own_input(hp: Hparams, w: Weights, block: str) -> OwnInput:
    d, width = hp.embedding_length, hp.layer_input_length
    return OwnInput(
        gate=w.linear(f"{block}.inp_gate", width, d),
        projection=w.linear(f"{block}.proj", d, width),
        post_norm=w.norm(f"{block}.post_norm", d, hp.rms_epsilon),
    )


def _layer_inputs(hp: Hparams, w: Weights) -> LayerInputs:
    """(√P·table[token] + norm(projection(x)/√d))/√2: the factors are in scale, weight, epsilon."""
    d, width, half = hp.embedding_length, hp.layer_input_length, math.sqrt(0.5)
    return LayerInputs(
        table=w.table("per_layer_token_embd.weight", hp.vocab_size, hp.layer_inputs_width),
        scale=half * math.sqrt(width),
        projection=w.linear("per_layer_model_proj", hp.layer_inputs_width, d),
        norm=w.norm("per_layer_proj_norm", width, hp.rms_epsilon * d, scale=half),
    )
