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

from worker.adapters.keys import ArchitectureKeys
from worker.adapters.llama import Llama
from worker.adapters.mixtral import Mixtral
from worker.adapters.weights import Weights
from worker.model import Hparams, Model, ModelOptions
from worker.rope import RopeScaling


def mistral3(hp: Hparams, keys: ArchitectureKeys, w: Weights, options: ModelOptions) -> Model:
    """Bind a model of the `mistral3` architecture, dense or with experts."""
    _check_temperature(hp, keys, options)
    scaled = replace(hp, rope_scaling=_rope_scaling(hp.rope_scaling, keys))
    return (Mixtral if hp.expert_count else Llama)(scaled, keys, w, options)


def _check_temperature(hp: Hparams, keys: ArchitectureKeys, options: ModelOptions) -> None:
    """Raise ModelLoadFailed if the temperature of attention is not 1 in the whole context."""
    scale, original = keys.get("attention.temperature_scale", float, 0.0), hp.rope_scaling.original_context
    if scale and options.context > original:
        problem = f"is {scale:g}, which changes the positions from {original} on of the context of {options.context}"
        raise keys.error("attention.temperature_scale", problem, f"a model.context of at most {original}")


def _rope_scaling(scaling: RopeScaling, keys: ArchitectureKeys) -> RopeScaling:
    """The file's scaling, with the log multiplier in `attn_factor`."""
    multiplier = keys.get("rope.scaling.yarn_log_multiplier", float, 0.0)
    if not 0 <= multiplier < math.inf:
        raise keys.error("rope.scaling.yarn_log_multiplier", f"is {multiplier}", "0 or a positive number")
    if scaling.kind != "yarn" or scaling.factor <= 1:
        return scaling
    return replace(scaling, attn_factor=scaling.attn_factor / (0.1 * multiplier * math.log(scaling.factor) + 1))
