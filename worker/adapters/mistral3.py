"""Mistral's models since Ministral 3, text only. GGUF architecture `mistral3`.

Model card: Mistral AI 2025 (Ministral 3). Differences from llama, and from Mixtral with experts:
  * YaRN whose magnitude is (0.1·ln s + 1) / (0.1·m·ln s + 1), with the factor s and m of
    `rope.scaling.yarn_log_multiplier` (`mscale_all_dim`): 1 in published files. With m = 0 it is
    YaRN's own;
  * queries of position p times 1 + β·ln(1 + ⌊p / n⌋), with β of `attention.temperature_scale` and n
    the original context, as in Llama 4: 1 for positions below n.

Older models of Mistral are files of architecture `llama`.
"""

import math
from dataclasses import replace
from typing import TypeVar

from worker.adapters.keys import ArchitectureKeys
from worker.adapters.llama import Llama
from worker.adapters.mixtral import Mixtral
from worker.adapters.weights import DenseLayer, ExpertLayer, Weights
from worker.model import Hparams, Model, ModelOptions
from worker.ops import PositionScale
from worker.rope import RopeScaling

Layer = TypeVar("Layer", DenseLayer, ExpertLayer)


def mistral3(hp: Hparams, keys: ArchitectureKeys, w: Weights, options: ModelOptions) -> Model:
    """Bind a model of the `mistral3` architecture, dense or with experts."""
    scale = _query_scale(hp, keys, options)
    scaled = replace(hp, rope_scaling=_rope_scaling(hp.rope_scaling, keys))
    if hp.expert_count:
        mixtral = Mixtral(scaled, keys, w, options)
        mixtral.layers = [_with_query_scale(layer, scale) for layer in mixtral.layers]
        return mixtral
    llama = Llama(scaled, keys, w, options)
    llama.layers = [_with_query_scale(layer, scale) for layer in llama.layers]
    return llama


def _with_query_scale(layer: Layer, scale: PositionScale | None) -> Layer:
    return replace(layer, attention=replace(layer.attention, query_scale=scale))


def _query_scale(hp: Hparams, keys: ArchitectureKeys, options: ModelOptions) -> PositionScale | None:
    """The scale of queries, None if it is 1 in the whole context."""
    scale, original = keys.get("attention.temperature_scale", float, 0.0), hp.rope_scaling.original_context
    if not 0 <= scale < math.inf:
        raise keys.error("attention.temperature_scale", f"is {scale}", "0 or a positive number")
    return PositionScale(scale, original) if scale and options.context > original else None


def _rope_scaling(scaling: RopeScaling, keys: ArchitectureKeys) -> RopeScaling:
    """The file's scaling, with the log multiplier in `attn_factor`."""
    multiplier = keys.get("rope.scaling.yarn_log_multiplier", float, 0.0)
    if not 0 <= multiplier < math.inf:
        raise keys.error("rope.scaling.yarn_log_multiplier", f"is {multiplier}", "0 or a positive number")
    if scaling.kind != "yarn" or scaling.factor <= 1:
        return scaling
    return replace(scaling, attn_factor=scaling.attn_factor / (0.1 * multiplier * math.log(scaling.factor) + 1))
