"""Catalogue of the parts of model files: names of tensors and metadata keys, in plain terms.

`describe_part` finds the description of a name that no adapter uses. The names are those of
llama.cpp's converter (`gguf.constants`). Next: `diagnosis.py`, which `worker inspect` shows.
"""

import re
from dataclasses import dataclass

UNKNOWN = "purpose unknown"


@dataclass(frozen=True, slots=True)
class Feature:
    """One part of an architecture, and what an adapter needs for it."""

    what: str
    needs: str
    tensors: str = ""
    """Pattern of tensor names, without `blk.N.` and without `.weight` or `.bias`."""
    keys: str = ""
    """Pattern of metadata keys, without the prefix `ARCH.`."""


FEATURES = (
    Feature(
        "recurrent layers: state-space (Mamba) or gated delta-net",
        "a recurrence op with a state and a convolution window for each sequence, which the blocks of the prefix "
        "cache cannot share",
        r"ssm_.*",
        r"ssm\..*|full_attention_interval|attention\.recurrent_layers",
    ),
    Feature(
        "RWKV layers (time mix and channel mix)",
        "a recurrence op with a state for each sequence",
        r"(time_mix|channel_mix)_.*",
        r"wkv\..*|time_mix_extra_dim|time_decay_extra_dim|token_shift_count|rescale_every_n_layers",
    ),
    Feature(
        "short convolution layers",
        "a convolution op with a window of past activations for each sequence",
        r"shortconv\..*",
        r"shortconv\..*",
    ),
    Feature(
        "sparse attention with an indexer",
        "an op that chooses the keys of each token, and a cache of indexer keys",
        r"indexer\..*",
        r"attention\.indexer\..*",
    ),
    Feature(
        "latent attention (MLA)",
        "a cache of one latent vector and one rotated key a token, attention with values narrower than keys, and "
        "low-rank projections of q",
        r"attn_(q_a|q_b|q_a_norm|kv_a_mqa|kv_a_norm|kv_b|k_b|v_b)",
        r"attention\.(q_lora_rank|kv_lora_rank|key_length_mla|value_length_mla)",
    ),
    Feature(
        "shared experts",
        "a dense FFN beside the chosen experts, added to their sum; a tensor ffn_gate_inp_shexp scales it",
        r"ffn_(gate|up|down|gate_inp|gate_up)_shexp",
        r"expert_shared_count|expert_shared_feed_forward_length|swiglu_clamp_shexp",
    ),
    Feature(
        "a bias in the choice of experts",
        "routing that adds a bias to choose experts, and weights them without it",
        r"exp_probs_b",
    ),
    Feature(
        "another routing of experts",
        "the router's function: sigmoid gates, scaled weights, groups of experts, or a clamp",
        r"ffn_gate_inp\.scale",
        r"expert_(gating_func|weights_scale|weights_norm|group_count|group_used_count|group_scale)|experts_per_group"
        r"|router_logit_softcapping|swiglu_clamp_exp",
    ),
    Feature(
        "a mixture of experts",
        "routing and the FFN of each token's experts",
        r"ffn_(gate|up|down)_exps|ffn_gate_inp",
        r"expert_(count|used_count|feed_forward_length)",
    ),
    Feature(
        "gate and up of the experts in one tensor",
        "a split of the fused tensor",
        r"ffn_gate_up_exps",
    ),
    Feature(
        "other experts (chunked or latent ones)",
        "an FFN of these experts",
        r"ffn_(gate|up|down)_chexps|ffn_latent_(down|up)|ffn_norm_exps",
        r"expert_chunk_feed_forward_length|moe_latent_size",
    ),
    Feature(
        "dense layers between mixture layers",
        "an FFN chosen for each layer",
        keys=r"leading_dense_block_count|interleave_moe_layer_step|moe_every_n_layers",
    ),
    Feature(
        "layers that predict further tokens (MTP)",
        "to leave these layers out, as plain decoding does",
        r"nextn\..*",
        r"nextn_predict_layers",
    ),
    Feature(
        "a norm after attention, or before the FFN if the file has no ffn_norm",
        "a norm of the attention's output before it is added to the residual, or the FFN's norm by this name",
        r"post_attention_norm",
    ),
    Feature(
        "norms after attention or FFN",
        "a norm of a layer's output before it is added to the residual",
        r"attn_post_norm|post_ffw_norm|attn_output_norm|layer_output_norm",
    ),
    Feature(
        "further norms around the FFN",
        "a norm of its own for each branch of the FFN",
        r"(pre|post)_ffw_norm_[12]|attn_norm_2|ffn_sub_norm|attn_sub_norm|ffn_pre_norm.*",
    ),
    Feature(
        "norms of q and k heads",
        "an RMSNorm of each query and key head before RoPE",
        r"attn_[qk]_norm",
    ),
    Feature(
        "embeddings for each layer",
        "a second embedding table, a gated projection into each layer's residual",
        r"per_layer_.*|inp_gate|proj|post_norm",
        r"embedding_length_per_layer_input",
    ),
    Feature(
        "alternating updates (AltUp) and low-rank residuals (Laurel)",
        "several residual streams, predicted and corrected in each layer",
        r"altup_.*|laurel_.*",
        r"altup\..*|activation_sparsity_scale",
    ),
    Feature("a scale of each layer's output", "a product with a scalar", r"layer_output_scale"),
    Feature(
        "a gate on the output of a layer's attention",
        "a product of that output with the activation of a projection",
        r"attn_gate",
    ),
    Feature(
        "an attention sink a head",
        "a logit in the softmax's denominator",
        r"attn_sinks",
    ),
    Feature(
        "a softcap of logits",
        "cap·tanh(x / cap) on attention scores or on the output logits",
        keys=r"(attn|final)_logit_softcapping",
    ),
    Feature(
        "a sliding window of attention, in all or some layers",
        "a window, and possibly a RoPE base and a head width, for each layer",
        keys=r"attention\.(sliding_window|sliding_window_pattern|key_length_swa|value_length_swa|head_count_kv_swa)"
        r"|rope\.(freq_base_swa|dimension_count_swa)",
    ),
    Feature(
        "shapes that differ between layers",
        "numbers of heads and FFN widths for each layer, and a cache for them",
        keys=r"attention\.head_count(_kv)?|feed_forward_length",
    ),
    Feature("values of another width than keys", "attention and a cache with both", keys=r"attention\.value_length"),
    Feature(
        "layers that share the keys and values of earlier layers",
        "attention that reads another layer's cache",
        keys=r"attention\.shared_kv_layers",
    ),
    Feature(
        "scales of embedding, residual, attention or logits",
        "these factors in the ops",
        keys=r"(embedding|residual|logit)_scale|attention\.(scale|output_scale|value_scale)",
    ),
    Feature(
        "attention temperature by position",
        "a factor of q that grows with the position",
        keys=r"attention\.temperature_(length|scale)",
    ),
    Feature("clamped q, k and v", "a clamp of the projections", keys=r"attention\.clamp_kqv"),
    Feature(
        "linear position biases (ALiBi) or relative ones",
        "a bias of the attention scores by distance",
        r"attn_rel_b|cross_attn_rel_b",
        r"attention\.(max_alibi_bias|relative_buckets_count)",
    ),
    Feature(
        "rotary embedding of several axes (M-RoPE)",
        "for text, whose axes have equal positions, the usual RoPE",
        keys=r"rope\.dimension_sections",
    ),
    Feature(
        "another scaling of RoPE",
        "its frequencies and its magnitude",
        r"rope_(freqs|factors_long|factors_short)",
        r"rope\.scal.*",
    ),
    Feature(
        "learned position embeddings",
        "a second embedding table, by position",
        r"position_embd",
    ),
    Feature("a norm of the embedding", "a norm before the first layer", r"token_embd_norm"),
    Feature("token type embeddings", "a second embedding table, by token type", r"token_types"),
    Feature(
        "LayerNorm instead of RMSNorm",
        "a norm that subtracts the mean, with a bias",
        r"(attn_norm|ffn_norm|output_norm)\.bias",
        r"attention\.(layer_norm_epsilon|group_norm_.*)|swin_norm",
    ),
    Feature(
        "encoder, decoder or cross attention",
        "a model that is no plain decoder",
        r"(enc|dec)\..*|cross_attn_.*",
        r"decoder_(block_count|start_token_id)|attention\.causal|pooling_type",
    ),
    Feature("a classifier", "an output that is no next token", r"cls(\..*)?", r"classifier\..*"),
    Feature("scales of weights", "a factor for a tensor, or for each expert", r".*\.scale"),
    Feature(
        "attention projections in one tensor, or in several",
        "projections of these shapes",
        r"attn_(qkv|q|k|v|output)",
    ),
    Feature("an FFN of another form", "projections of these shapes", r"ffn_(gate|up|down|norm)"),
)
"""The first match counts, so special entries come before general ones."""


BIAS = Feature("biases of projections", "a bias in these projections")


def describe_part(name: str, *, key: bool = False) -> Feature:
    """The first feature that has this tensor, or this key without its prefix; else UNKNOWN."""
    plain = name if key else re.sub(r"^(blk\.(\d+|\*)\.)?(.*?)(\.weight)?$", r"\3", name)
    without_bias = plain.removesuffix(".bias")
    for feature in FEATURES:
        pattern = feature.keys if key else feature.tensors
        if pattern and re.fullmatch(pattern, plain):
            return feature
    for feature in FEATURES:
        if not key and without_bias != plain and feature.tensors and re.fullmatch(feature.tensors, without_bias):
            return BIAS if re.fullmatch(r"attn_.*|ffn_.*|output", without_bias) else feature
    return Feature(UNKNOWN, "a definition of what these do, such as llama.cpp's")
